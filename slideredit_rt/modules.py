"""The masked low-rank update inside a diffusers transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, fit_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind, RowSet, TensorSpec
from slideredit_rt.kernels import masked_lora_linear
from slideredit_rt.sliders import combine_row_scale


class RowScales:
    """The row scales of the latest call, shared by every adapted linear of one backbone."""

    def __init__(self) -> None:
        self._parts: dict[RowSet, Tensor] = {}

    def set(self, row_scale: Tensor | None, text_rows: int) -> None:
        """Float32 `[B, S]`, for a bank `[B, S, G]`, text rows first, then image rows for a GST adapter. None turns it off.

        The parts are laid out once here and not by each of the linears that ask for them.
        """
        self._parts = {}
        if row_scale is not None:
            text, image = row_scale[:, :text_rows], row_scale[:, text_rows:]
            self._parts = {"joint": row_scale, "text": text.contiguous(), "image": image.contiguous()}

    def of(self, rows: RowSet) -> Tensor | None:
        """The scales of text, image or joint rows; None while the adapter is off."""
        return self._parts.get(rows)


class MaskedLoRALinear(nn.Linear):
    """A frozen linear plus a low-rank update scaled per row.

    Shares the wrapped linear's parameters under their own names, so that state-dict keys of the base do not change.

    Args:
        linear: the projection, weight `[N, K]`.
        rows: which rows of the backbone it projects.
        scales: where the row scales of a call are found.
        lora_a: `[R, K]`.
        lora_b: `[N, R]`, LoRA's `lora_alpha / r` folded in.
    """

    def __init__(self, linear: nn.Linear, rows: RowSet, scales: RowScales, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.rows: RowSet = rows
        self.scales = scales
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, K]` to `[B, S, N]`."""
        row_scale = self.scales.of(self.rows)
        if row_scale is None:
            return F.linear(x, self.weight, self.bias)
        return masked_lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, row_scale)


class SliderBackbone(nn.Module):
    """A diffusers transformer with an adapter injected: named inputs, `alpha` and `token_mask` in, prediction out.

    The eager reference of every engine and the module that is exported. With `adapter=None` it is the frozen backbone
    and takes no slider inputs. With a bank of G adapters, `alpha` has one number per slider and member. The transformer passed
    in is changed in place; `remove()` restores it. One thread at a time: the linears share the row scales of a call, until its
    backward pass is over. Engines, `SliderEditor` and the compat pipeline take turns around it.
    """

    def __init__(self, family: Family, transformer: nn.Module, adapter: Adapter | None) -> None:
        super().__init__()
        family.prepare_transformer(transformer)
        self.family = family
        self.transformer = transformer
        self.kind: Kind | None = adapter.kind if adapter else None
        self.members = tuple(adapter.members) if adapter else ()
        self.scales = RowScales()
        self.adapted: dict[str, MaskedLoRALinear] = {}
        if adapter is not None:
            self._inject(adapter)

    def _inject(self, adapter: Adapter) -> None:
        fit_adapter(adapter, self.family, self.transformer)
        adapted = {}
        for name, (lora_a, lora_b) in adapter.pairs.items():
            linear, rows = self.transformer.get_submodule(name), self.family.rows_of(name)
            assert isinstance(linear, nn.Linear)
            assert rows is not None
            if adapter.kind == "st" and rows != "text":
                raise SliderEditError(
                    f"adapter {adapter.source!r} says it is ST but updates {name}, which has no text rows of its own; "
                    "use an ST adapter, or mark this one as gst in its metadata"
                )
            if not linear.weight.is_floating_point():
                raise SliderEditError(
                    f"the transformer is quantised: {name} is stored as {linear.weight.dtype}; load it without a quantisation"
                )
            device = linear.weight.device
            adapted[name] = MaskedLoRALinear(linear, rows, self.scales, lora_a.to(device), lora_b.to(device))
        # Only now, so that a refused adapter leaves the transformer as it was.
        for name, module in adapted.items():
            self._replace(name, module)

    def _replace(self, name: str, module: nn.Linear) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.transformer.get_submodule(parent), child, module)
        if isinstance(module, MaskedLoRALinear):
            self.adapted[name] = module

    def remove(self) -> None:
        """Put the original linears back."""
        for name, module in self.adapted.items():
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            self._replace(name, linear)
        self.adapted.clear()

    def slider_specs(self) -> list[TensorSpec]:
        """The slider inputs: none for a frozen backbone."""
        if self.kind is None:
            return []
        rows = "text_rows" if self.kind == "st" else "rows"
        bank = (len(self.members),) if self.members else ()
        return [
            TensorSpec("alpha", "float32", ("batch", "sliders", *bank)),
            TensorSpec("token_mask", "bool", ("batch", "sliders", rows)),
        ]

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One prediction.

        Args:
            inputs: the family's inputs, and for an adapted backbone `alpha` (float32 `[B, K]`, for a bank `[B, K, G]`) and
                `token_mask` (bool `[B, K, S]`). Without them the frozen backbone answers.

        Returns:
            `[B, image_rows, C]`.
        """
        backbone_inputs = dict(inputs)
        alpha, token_mask = backbone_inputs.pop("alpha", None), backbone_inputs.pop("token_mask", None)
        # Stays set after the call: with gradient checkpointing the linears run again during the backward pass.
        row_scale = None if alpha is None or token_mask is None else combine_row_scale(alpha, token_mask)
        self.scales.set(row_scale, text_rows=inputs["encoder_hidden_states"].shape[1])
        return self.family.run(self.transformer, backbone_inputs)

"""Modules that add the masked low-rank update to a diffusers transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, AdapterInputs, fit_adapter
from slideredit_rt.adapters.adapter import check_text_rows
from slideredit_rt.adapters.inputs import is_adapter_input
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind, RowSet, TensorSpec
from slideredit_rt.kernels import masked_lora_linear, masked_lora_update
from slideredit_rt.quantization.linear import QuantizedLinear
from slideredit_rt.spans import combine_row_scale


class RowScales:
    """Row scales of the current call, shared by all adapted linears of a backbone."""

    def __init__(self) -> None:
        self._parts: dict[RowSet, Tensor] = {}

    def set(self, row_scale: Tensor | None, text_rows: int, unscaled: int | None = None) -> None:
        """Set the row scales of a call. Text and image rows are split once here, not by every linear.

        Joint rows are text rows, then image rows.

        Args:
            row_scale: float32 `[B, S]`, for a bank `[B, S, G]`: text rows, then image rows for a GST adapter. None turns the
                adapter off.
            text_rows: Number of text rows.
            unscaled: Number of image rows that `row_scale` leaves out; they get the scale 0 among the joint rows. None if it
                has a scale for every row.
        """
        self._parts = {}
        if row_scale is not None:
            text, image, joint = row_scale[:, :text_rows], row_scale[:, text_rows:], row_scale
            if unscaled is not None:
                zeros = row_scale.new_zeros(row_scale.shape[0], unscaled, *row_scale.shape[2:])
                joint = torch.cat([row_scale, zeros], dim=1)
            self._parts = {"joint": joint, "text": text.contiguous(), "image": image.contiguous()}

    def of(self, rows: RowSet) -> Tensor | None:
        """Return the scales of text, image or joint rows; None while the adapter is off."""
        return self._parts.get(rows)


class CallPair:
    """A and B of one linear during a call, for a backbone that takes its adapter as inputs."""

    a: Tensor
    b: Tensor


class LowRank:
    """Source of an adapted linear's A and B: parameters of its own, or the tensors of a call."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    _of_call: CallPair | None = None

    def take_from_calls(self, pair: CallPair) -> None:
        """Use the A and B of each call instead of parameters."""
        del self.lora_A, self.lora_B
        self._of_call = pair

    def share_low_rank(self, other: LowRank) -> None:
        """Use the same A and B as another adapted linear."""
        if other._of_call is None:
            self.lora_A, self.lora_B = other.lora_A, other.lora_B
        self._of_call = other._of_call

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return A `[R, K]` and B `[N, R]`."""
        return (self.lora_A, self.lora_B) if self._of_call is None else (self._of_call.a, self._of_call.b)


class MaskedLoRALinear(LowRank, nn.Linear):
    """A frozen linear plus a low-rank update scaled per row: `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`.

    It shares the wrapped linear's parameters under their own names, so the state-dict keys of the base do not change.

    Args:
        linear: Linear to wrap, weight `[N, K]`.
        rows: Rows of the backbone that it projects.
        scales: Row scales of the backbone.
        lora_a: A, `[R, K]`.
        lora_b: B, `[N, R]`, with `lora_alpha / r` folded in.
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
        """Project `[B, S, K]` to `[B, S, N]`."""
        row_scale = self.scales.of(self.rows)
        if row_scale is None:
            return F.linear(x, self.weight, self.bias)
        return masked_lora_linear(x, self.weight, self.bias, *self.low_rank(), row_scale)

    def frozen(self) -> nn.Linear:
        """Return the wrapped linear."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


class MaskedLoRAQuantizedLinear(LowRank, QuantizedLinear):
    """A quantised linear plus a low-rank update of its unquantised input: `y = q(x) Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`.

    It shares the wrapped linear's tensors under their own names, as `MaskedLoRALinear` does.

    Args:
        linear: Linear to wrap.
        rows: Rows of the backbone that it projects.
        scales: Row scales of the backbone.
        lora_a: A, `[R, K]`.
        lora_b: B, `[N, R]`, with `lora_alpha / r` folded in.
    """

    def __init__(self, linear: QuantizedLinear, rows: RowSet, scales: RowScales, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__(*_sizes(linear), bias=linear.bias is not None, activations=linear.activations, device="meta")
        self.share(linear)
        self.rows: RowSet = rows
        self.scales = scales
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """Project `[B, S, K]` to `[B, S, N]`."""
        row_scale, y = self.scales.of(self.rows), super().forward(x)
        return y if row_scale is None else masked_lora_update(y, x, *self.low_rank(), row_scale)

    def frozen(self) -> QuantizedLinear:
        """Return the wrapped linear."""
        linear = QuantizedLinear(*_sizes(self), bias=self.bias is not None, activations=self.activations, device="meta")
        linear.share(self)
        return linear


def _sizes(linear: QuantizedLinear) -> tuple[int, int, str]:
    return linear.in_features, linear.out_features, linear.precision


AdaptedLinear = MaskedLoRALinear | MaskedLoRAQuantizedLinear


class SliderBackbone(nn.Module):
    """A diffusers transformer with an adapter, which takes the family's inputs plus `alpha` and `token_mask`.

    With `AdapterInputs` in place of an adapter, A and B are inputs of every call as well. With `adapter=None`, it is the frozen
    backbone without slider inputs. It is the eager reference of every engine, and the module that is exported. The transformer
    is changed in place; `remove()` restores it.

    Not thread-safe: the linears share the row scales of a call until its backward pass is over. Engines, `SliderEditor` and
    the compat pipeline serialise their calls.

    Args:
        family: Family of the transformer.
        transformer: diffusers transformer to change.
        adapter: Adapter or bank to add, or the layout of adapter inputs; None for the frozen backbone.

    Raises:
        SliderEditError: The adapter does not fit the transformer, or a library has quantised the transformer.
    """

    def __init__(self, family: Family, transformer: nn.Module, adapter: Adapter | AdapterInputs | None) -> None:
        super().__init__()
        family.prepare_transformer(transformer)
        self.family = family
        self.transformer = transformer
        self.kind: Kind | None = adapter.kind if adapter else None
        self.members = tuple(adapter.members) if isinstance(adapter, Adapter) else ()
        self.adapter_inputs = adapter if isinstance(adapter, AdapterInputs) else None
        self.scales = RowScales()
        self.adapted: dict[str, AdaptedLinear] = {}
        self._attention: list[tuple[str, nn.Module]] = []
        self._pairs: dict[str, CallPair] = {}
        if isinstance(adapter, Adapter):
            self._inject(adapter)
        elif adapter is not None:
            self._inject(adapter.blank())
            for name, linear in self.adapted.items():
                linear.take_from_calls(self._pairs.setdefault(name, CallPair()))

    def _inject(self, adapter: Adapter) -> None:
        fit_adapter(adapter, self.family, self.transformer)
        check_text_rows(adapter, self.family)
        adapted: dict[str, AdaptedLinear] = {}
        for name, (lora_a, lora_b) in adapter.pairs.items():
            linear, rows = self.transformer.get_submodule(name), self.family.rows_of(name)
            assert isinstance(linear, nn.Linear | QuantizedLinear)
            assert rows is not None
            device = linear.weight.device
            update = rows, self.scales, lora_a.to(device), lora_b.to(device)
            if isinstance(linear, QuantizedLinear):
                adapted[name] = MaskedLoRAQuantizedLinear(linear, *update)
                continue
            if not linear.weight.is_floating_point():
                raise SliderEditError(
                    f"the transformer is quantised: {name} is stored as {linear.weight.dtype}; load it without quantisation"
                )
            adapted[name] = MaskedLoRALinear(linear, *update)
        parents = {name.rpartition(".")[0] for name in adapted}
        self._attention = [(name, self.transformer.get_submodule(name)) for name in parents if name.endswith(".attn")]
        # Replace after all checks, so that a refused adapter leaves the transformer unchanged.
        for name, module in adapted.items():
            self._replace(name, module)
            self.adapted[name] = module

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.transformer.get_submodule(parent), child, module)

    def remove(self) -> None:
        """Restore the original linears."""
        for name, module in self.adapted.items():
            self._replace(name, module.frozen())
        self.adapted.clear()

    def release_linears(self) -> dict[str, AdaptedLinear]:
        """Return the adapted linears by name and forget them, for a caller who replaces them. `remove()` then does nothing."""
        released = dict(self.adapted)
        self.adapted.clear()
        self._attention.clear()
        return released

    def set_scales(self, row_scale: Tensor | None, text_rows: int, image_rows: int) -> None:
        """Set the row scales of the next call of the transformer.

        Args:
            row_scale: float32 `[B, S]`, for a bank `[B, S, G]`, where S is the text rows for an ST adapter, and text and image
                rows for a GST adapter. None turns the adapter off.
            text_rows: Number of text rows.
            image_rows: Number of image rows, which an ST adapter never updates.

        Raises:
            SliderEditError: The projections were fused after the adapter was added, so the transformer bypasses it.
        """
        for name, attention in self._attention:
            if getattr(attention, "fused_projections", False):
                raise SliderEditError(
                    f"the projections of {name} were fused after the adapter was added, which leaves the adapter out; call "
                    "unfuse_qkv_projections(), or do not call fuse_qkv_projections()"
                )
        self.scales.set(row_scale, text_rows, image_rows if self.kind == "st" else None)

    def slider_specs(self) -> list[TensorSpec]:
        """Return the specs of the slider inputs, then those of adapter inputs; empty for a frozen backbone."""
        if self.kind is None:
            return []
        rows = "text_rows" if self.kind == "st" else "rows"
        bank = (len(self.members),) if self.members else ()
        return [
            TensorSpec("alpha", "float32", ("batch", "sliders", *bank)),
            TensorSpec("token_mask", "bool", ("batch", "sliders", rows)),
            *(self.adapter_inputs.specs() if self.adapter_inputs else ()),
        ]

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step.

        Args:
            inputs: Inputs of the family and, for an adapted backbone, `alpha` (float32 `[B, K]`, for a bank `[B, K, G]`) and
                `token_mask` (bool `[B, K, S]`). Without these two, the adapter is off. With them, a backbone that takes its
                adapter as inputs also needs those (see `AdapterInputs`).

        Returns:
            Prediction `[B, image_rows, C]`.
        """
        return self.family.run(self.transformer, self._scaled(inputs))

    def outputs(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Predict one step like `forward`; return all outputs of the family (see `Family.outputs`)."""
        return self.family.outputs(self.transformer, self._scaled(inputs))

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images with the adapter off (see `Family.read`)."""
        return self.family.read(self.transformer, self._scaled(without_sliders(inputs)))

    def _scaled(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Set the row scales of a call; return its inputs without those of the sliders."""
        backbone_inputs = dict(inputs)
        alpha, token_mask = backbone_inputs.pop("alpha", None), backbone_inputs.pop("token_mask", None)
        # Keep the scales set after the call: with gradient checkpointing, the linears run again during the backward pass.
        row_scale = None if alpha is None or token_mask is None else combine_row_scale(alpha, token_mask)
        self.set_scales(row_scale, inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1])
        if self.adapter_inputs is not None and row_scale is not None:
            dtype = next(self.transformer.parameters()).dtype
            for name, (lora_a, lora_b) in self.adapter_inputs.unpack(inputs, dtype).items():
                self._pairs[name].a, self._pairs[name].b = lora_a, lora_b
        return {name: value for name, value in backbone_inputs.items() if not is_adapter_input(name)}


def without_sliders(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a backbone without those of the sliders."""
    return {name: value for name, value in inputs.items() if name not in ("alpha", "token_mask")}

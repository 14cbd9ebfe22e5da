"""FLUX.2-klein with a key-value cache: the source images are read once per edit instead of in every step.

Rows of source images only attend to themselves and are modulated at a fixed timestep, so their keys and values depend on the
images alone: not on the prompt, the noise, the step or a slider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    _get_qkv_projections,
)
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families.base import Conditioning, EncodedImages, TensorSpec
from slideredit_rt.families.flux2 import Flux2

_KEYS_VALUES = "reference_keys_values"


class Flux2KV(Flux2):
    """The FLUX.2 family with a key-value cache: checkpoints of diffusers' `Flux2KleinKVPipeline`, which are distilled."""

    name = "flux2_kv"
    pipeline_classes = ("Flux2KleinKVPipeline",)
    variant_of = Flux2.name
    reads_images_once = True
    # Diffusers' own class replaces the transformer's attention processors, so it cannot be made without a transformer.
    encoding_pipeline: ClassVar[type | None] = Flux2KleinPipeline

    def default_steps(self, pipeline: Any) -> int:
        return self.num_inference_steps

    def default_true_cfg_scale(self, pipeline: Any) -> float:
        return 1.0

    def prepare_transformer(self, transformer: Any) -> None:
        """Set attention processors and position ids that also run in a traced graph (see `Family.prepare_transformer`)."""
        for block in transformer.transformer_blocks:
            block.attn.set_processor(_DualAttention())
        for block in transformer.single_transformer_blocks:
            block.attn.set_processor(_SingleAttention())
        transformer.pos_embed = _Positions(transformer.config.rope_theta, tuple(transformer.config.axes_dims_rope))

    def _stored(self, config: Mapping[str, Any], name: str, sets: str, rows: str, dtype: str = "float32") -> TensorSpec:
        """Return the spec of keys and values: by block (dual-stream, then single-stream), the keys before the values."""
        blocks = config["num_layers"] + config["num_single_layers"]
        heads = config["num_attention_heads"], config["attention_head_dim"]
        return TensorSpec(name, dtype, (blocks, 2, sets, rows, *heads))

    def input_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        return [
            *super().input_specs(config),
            self._stored(config, _KEYS_VALUES, "references", "reference_rows", dtype),
            TensorSpec("reference", "int64", ("batch",)),
            TensorSpec("kept", "int64", ("kept_rows",)),
        ]

    def output_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        return [self.output_spec(config), self._stored(config, "keys_values", "batch", "kept_rows", dtype)]

    def random_inputs(
        self, config: Mapping[str, Any], batch: int, text_rows: int, image_rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        inputs = super().random_inputs(config, batch, text_rows, image_rows, generator)
        # Sizes of their own: a trace must not confuse them with the others.
        references, rows = 3 * batch - 2, image_rows + 1
        shape = self._stored(config, _KEYS_VALUES, "references", "reference_rows").resolve(
            {"references": references, "reference_rows": rows}
        )
        return inputs | {
            _KEYS_VALUES: torch.randn(shape, generator=generator),
            "reference": torch.randint(references, (batch,), generator=generator),
            "kept": torch.arange(max(1, image_rows // 3)),
        }

    def step_rows(self, rows: int) -> int:
        return rows

    def _call(self, transformer: nn.Module, inputs: Mapping[str, Tensor], *, keep: bool) -> tuple[Tensor, _References]:
        own = dict(inputs)
        stored, reference, kept = (own.pop(name) for name in (_KEYS_VALUES, "reference", "kept"))
        dtype = next(transformer.parameters()).dtype
        cast = {name: own[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states")}
        references = _References(stored, reference, kept if keep else None, transformer, dtype)
        output = transformer(**own | cast, kv_cache=references, kv_cache_mode="cached", return_dict=False)[0]
        return output, references

    def run(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._call(transformer, inputs, keep=False)[0]

    def outputs(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        output, references = self._call(transformer, inputs, keep=True)
        return output, references.kept_rows()

    def read(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._call(transformer, inputs, keep=True)[1].kept_rows()

    def read_inputs(self, config: Mapping[str, Any], sources: EncodedImages) -> dict[str, Tensor]:
        latents = sources.reference
        rows, device = latents.shape[1], latents.device
        spec = self._stored(config, _KEYS_VALUES, "references", "reference_rows")
        return {
            "hidden_states": latents.contiguous(),
            "encoder_hidden_states": latents.new_zeros(1, 0, config["joint_attention_dim"]),
            "timestep": latents.new_zeros(1),
            "img_ids": sources.inputs["reference_ids"].contiguous(),
            "txt_ids": latents.new_zeros(0, sources.inputs["reference_ids"].shape[1]),
            _KEYS_VALUES: latents.new_zeros(spec.resolve({"references": 1, "reference_rows": 0})),
            "reference": torch.zeros(1, dtype=torch.int64, device=device),
            "kept": torch.arange(rows, device=device),
        }

    def with_read(self, sources: EncodedImages, keys_values: Tensor) -> EncodedImages:
        device = sources.reference.device
        added = {
            _KEYS_VALUES: keys_values,
            "reference": torch.zeros(1, dtype=torch.int64, device=device),
            "kept": torch.zeros(0, dtype=torch.int64, device=device),
        }
        return replace(sources, reference=sources.reference[:, :0], inputs={"img_ids": sources.inputs["img_ids"], **added})

    def encode_sources(self, pipeline: Any, images: Sequence[Image.Image]) -> EncodedImages:
        sources = super().encode_sources(pipeline, images)
        ids, rows = sources.inputs["img_ids"], sources.reference.shape[1]
        return replace(sources, inputs={"img_ids": ids[:-rows], "reference_ids": ids[-rows:]})

    def batch_inputs(
        self, config: Mapping[str, Any], conditioning: Conditioning, alpha: Tensor, token_mask: Tensor
    ) -> dict[str, Tensor]:
        stored = conditioning.inputs.get(_KEYS_VALUES)
        if stored is None:
            raise SliderEditError(
                "the keys and values of the source images are missing, without which a flux2_kv transformer cannot edit; "
                "prepare the edit with SliderEditor.prepare"
            )
        # A row is a patch of 2 × 2 latents.
        rows = sum(height * width for height, width in conditioning.sizes) // 4
        if stored.shape[3] != rows:
            raise SliderEditError(
                f"the keys and values are those of {stored.shape[3]} image rows, but the source images have {rows}; they were "
                "changed after they were prepared, so prepare the edit again"
            )
        return super().batch_inputs(config, conditioning, alpha, token_mask)


class _Layer:
    """Keys and values of the source images for one block, `[B, rows, heads, D]`, and those that the block's own image rows get.

    Args:
        keys: Keys of the source images.
        values: Values of the source images.
        kept: Image rows whose own keys and values are kept; None keeps none.
    """

    def __init__(self, keys: Tensor, values: Tensor, kept: Tensor | None) -> None:
        self.keys = keys
        self.values = values
        self.kept = kept
        self.own: tuple[Tensor, ...] = ()


class _References:
    """Keys and values of all blocks, in the form in which diffusers' transformer passes them to its blocks.

    Args:
        stored: `[blocks, 2, references, reference_rows, heads, D]`.
        reference: Index of each batch row's source images, int64 `[B]`.
        kept: Image rows whose own keys and values are kept; None keeps none.
        transformer: Transformer that gets them.
        dtype: Dtype of its arithmetic.
    """

    def __init__(self, stored: Tensor, reference: Tensor, kept: Tensor | None, transformer: Any, dtype: torch.dtype) -> None:
        self.num_ref_tokens = stored.shape[3]
        self._stored, self._reference, self._kept, self._dtype = stored, reference, kept, dtype
        self._dual = len(transformer.transformer_blocks)
        self._layers: list[_Layer] = []

    def get_double(self, index: int) -> _Layer:
        # Select when the block runs, so that the rows of only one block are in memory a second time.
        keys, values = (self._stored[index, part].index_select(0, self._reference).to(self._dtype) for part in (0, 1))
        layer = _Layer(keys, values, self._kept)
        if self._kept is not None:
            self._layers.append(layer)
        return layer

    def get_single(self, index: int) -> _Layer:
        return self.get_double(self._dual + index)

    def kept_rows(self) -> Tensor:
        """Return the keys and values that were kept, `[blocks, 2, B, kept_rows, heads, D]`."""
        return torch.stack([torch.stack(layer.own) for layer in self._layers])


def _attend(query: Tensor, key: Tensor, value: Tensor, text_rows: int, layer: _Layer, backend: Any) -> Tensor:
    """Attend to text, source images and noisy rows; return `[B, rows, heads · D]`. Keep what `layer` asks for."""
    if layer.kept is not None:
        layer.own = tuple(one[:, text_rows:].index_select(1, layer.kept) for one in (key, value))
    keys, values = (
        torch.cat([own[:, :text_rows], stored, own[:, text_rows:]], dim=1)
        for own, stored in ((key, layer.keys), (value, layer.values))
    )
    attended: Tensor = dispatch_attention_fn(query, keys, values, backend=backend)
    return attended.flatten(2, 3).to(query.dtype)


class _DualAttention(Flux2KVAttnProcessor):  # type: ignore[misc]
    """Diffusers' attention of dual-stream blocks that also takes a `_Layer`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
    ) -> Any:
        if not isinstance(kv_cache, _Layer):
            rest = attention_mask, image_rotary_emb, kv_cache, kv_cache_mode, num_ref_tokens
            return super().__call__(attn, hidden_states, encoder_hidden_states, *rest)
        assert encoder_hidden_states is not None
        text_rows = encoder_hidden_states.shape[1]
        projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        image, text = ([one.unflatten(-1, (-1, attn.head_dim)) for one in part] for part in (projected[:3], projected[3:]))
        query = torch.cat([attn.norm_added_q(text[0]), attn.norm_q(image[0])], dim=1)
        key = torch.cat([attn.norm_added_k(text[1]), attn.norm_k(image[1])], dim=1)
        value = torch.cat([text[2], image[2]], dim=1)
        query, key = (apply_rotary_emb(one, image_rotary_emb, sequence_dim=1) for one in (query, key))
        attended = _attend(query, key, value, text_rows, kv_cache, self._attention_backend)
        to_out, dropout = attn.to_out
        return dropout(to_out(attended[:, text_rows:])), attn.to_add_out(attended[:, :text_rows])


class _SingleAttention(Flux2KVParallelSelfAttnProcessor):  # type: ignore[misc]
    """Diffusers' attention of single-stream blocks that also takes a `_Layer`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Any:
        if not isinstance(kv_cache, _Layer):
            rest = kv_cache, kv_cache_mode, num_txt_tokens, num_ref_tokens
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb, *rest)
        projected = attn.to_qkv_mlp_proj(hidden_states)
        sizes = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor]
        query, key, value, mlp = projected.split(sizes, dim=-1)
        query, key, value = (one.unflatten(-1, (-1, attn.head_dim)) for one in (query, key, value))
        query, key = (
            apply_rotary_emb(norm(one), image_rotary_emb, sequence_dim=1)
            for norm, one in ((attn.norm_q, query), (attn.norm_k, key))
        )
        attended = _attend(query, key, value, num_txt_tokens, kv_cache, self._attention_backend)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(mlp)], dim=-1))


class _Positions(nn.Module):
    """Diffusers' rotary embedding of position ids, bit for bit. As a graph, it also takes no rows at all.

    Args:
        theta: Base of the frequencies.
        sizes: Number of channels of each axis of the ids.
    """

    def __init__(self, theta: float, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.theta = theta
        self.axes_dim = sizes

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines for ids `[rows, axes]`, float32 `[rows, channels]`."""
        angles = []
        for axis, size in enumerate(self.axes_dim):
            exponents = torch.arange(0, size, 2, dtype=torch.float64, device=ids.device) / size
            frequencies = (1.0 / self.theta**exponents).repeat_interleave(2)
            angles.append(ids[:, axis : axis + 1].double() * frequencies)
        together = torch.cat(angles, dim=1)
        return together.cos().float(), together.sin().float()

"""FLUX.1-Kontext: 19 dual-stream and 38 single-stream blocks, T5 text rows, a pooled CLIP vector, embedded guidance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.families.base import EncodedImages, Family, Kind, RowSet, TensorSpec, in_blocks
from slideredit_rt.spans import PromptToken

_TEXT_LINEARS = r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net\.(0\.proj|2))"
_IMAGE_LINEARS = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
_SINGLE_ATTENTION = r"single_transformer_blocks\.\d+\.attn\.to_[qkv]"
_SINGLE_LINEARS = rf"({_SINGLE_ATTENTION}|single_transformer_blocks\.\d+\.proj_(mlp|out))"

# Names of Black Forest Labs' own files. In the last norm, they put the shift before the scale.
_ORIGINAL_EMBEDDERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_ORIGINAL_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": ("attn.norm_q.weight",),
    "img_attn.norm.key_norm.scale": ("attn.norm_k.weight",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q.weight",),
    "txt_attn.norm.key_norm.scale": ("attn.norm_added_k.weight",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_ORIGINAL_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm.scale": ("attn.norm_q.weight",),
    "norm.key_norm.scale": ("attn.norm_k.weight",),
}


class FluxKontext(Family):
    """The FLUX.1-Kontext family."""

    name = "flux_kontext"
    pipeline_classes = ("FluxKontextPipeline",)
    # The paper's inference settings for FLUX.1-Kontext.
    guidance_scale = 3.5
    num_inference_steps = 28
    neutral_prompt = "keep the image the same"
    linears: ClassVar[Mapping[RowSet, str]] = {"text": _TEXT_LINEARS, "image": _IMAGE_LINEARS, "joint": _SINGLE_LINEARS}
    joint_projections: ClassVar = {
        "to_qkv": ("to_q", "to_k", "to_v"),
        "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    no_float16 = "its activations exceed 65504, the largest float16 value, and become infinite"
    proportions: ClassVar = {
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.0\.proj": Fraction(4),
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.2": Fraction(1, 4),
        r"single_transformer_blocks\.\d+\.proj_out": Fraction(1, 5),
    }
    original_names: ClassVar = {
        **_ORIGINAL_EMBEDDERS,
        **in_blocks("double_blocks", "transformer_blocks", _ORIGINAL_DOUBLE),
        **in_blocks("single_blocks", "single_transformer_blocks", _ORIGINAL_SINGLE),
    }
    swapped_halves = ("norm_out.linear",)
    modulation = r"transformer_blocks\.\d+\.norm1(_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear"

    def load_pipeline(self, folder: Path, *, transformer: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        pipeline = super().load_pipeline(folder, transformer=transformer, dtype=dtype)
        # On a CPU, convolutions are faster in this layout: decoding a batch takes two thirds of the time.
        pipeline.vae.to(memory_format=torch.channels_last)
        return pipeline

    def targets(self, kind: Kind, *, all_projections: bool = False) -> re.Pattern[str]:
        if kind == "st":
            # 114 modules on the full model, and 190 more on joint rows, of which the slider scales its text rows.
            return re.compile(rf"{_TEXT_LINEARS}|{_SINGLE_LINEARS}" if all_projections else _TEXT_LINEARS)
        # The q/k/v suffixes of the released GST adapters also match the single-stream blocks, so they have 342 modules on the
        # full model. All projections would be 418.
        single = _SINGLE_LINEARS if all_projections else _SINGLE_ATTENTION
        return re.compile(rf"{_TEXT_LINEARS}|{_IMAGE_LINEARS}|{single}")

    def input_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        specs = [
            TensorSpec("hidden_states", "float32", ("batch", "image_rows", config["in_channels"])),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "text_rows", config["joint_attention_dim"])),
            TensorSpec("pooled_projections", "float32", ("batch", config["pooled_projection_dim"])),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("img_ids", "float32", ("image_rows", 3)),
            TensorSpec("txt_ids", "float32", ("text_rows", 3)),
        ]
        return [*specs, TensorSpec("guidance", "float32", ("batch",))] if config["guidance_embeds"] else specs

    def output_spec(self, config: Mapping[str, Any]) -> TensorSpec:
        channels = config.get("out_channels") or config["in_channels"]
        return TensorSpec("sample", "float32", ("batch", "image_rows", channels))

    def random_inputs(
        self, config: Mapping[str, Any], batch: int, text_rows: int, image_rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        sizes = {"batch": batch, "text_rows": text_rows, "image_rows": image_rows}
        inputs = {s.name: torch.randn(s.resolve(sizes), generator=generator) for s in self.input_specs(config)}
        inputs["timestep"] = torch.rand(batch, generator=generator)
        inputs["txt_ids"] = torch.zeros(text_rows, 3)
        side = max(1, int(image_rows**0.5))
        row = torch.arange(image_rows)
        inputs["img_ids"] = torch.stack([torch.zeros(image_rows), row // side, row % side], dim=1)
        if "guidance" in inputs:
            inputs["guidance"] = torch.full((batch,), self.guidance_scale)
        return inputs

    def run(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = next(transformer.parameters()).dtype
        cast = {name: inputs[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")}
        output: Tensor = transformer(**{**inputs, **cast}, return_dict=False)[0]
        return output

    def max_text_rows(self, pipeline: Any) -> int:
        # FLUX reads at most 512 T5 tokens. The tokenizer of a smaller base has a smaller limit.
        return min(512, int(pipeline.tokenizer_2.model_max_length))

    def tokenize(self, pipeline: Any, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        tokenizer = pipeline.tokenizer_2
        encoded = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
        texts = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        offsets = encoded["offset_mapping"]
        return [PromptToken(text, start, end, row) for row, (text, (start, end)) in enumerate(zip(texts, offsets, strict=True))]

    def encode_prompt(
        self, pipeline: Any, prompts: list[str], text_rows: int, images: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Tensor]:
        # The device is given, because diffusers would take that of an encoder, whose weights may be elsewhere.
        embeds, pooled, txt_ids = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=pipeline.vae.device, max_sequence_length=text_rows
        )
        # Position ids are float32 for any pipeline dtype, because bfloat16 cannot represent all integers above 256.
        return {
            "encoder_hidden_states": embeds.float(),
            "pooled_projections": pooled.float(),
            "txt_ids": txt_ids.float(),
        }

    def preprocess(self, pipeline: Any, image: Image.Image) -> Tensor:
        side = self.side(pipeline)
        multiple = pipeline.vae_scale_factor * 2
        aspect = image.width / image.height
        if side == 1024:
            # Kontext was trained on these resolutions.
            _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        else:
            width = max(1, round(side * aspect**0.5 / multiple)) * multiple
            height = max(1, round(side / aspect**0.5 / multiple)) * multiple
        processor = pipeline.image_processor
        pixels: Tensor = processor.preprocess(processor.resize(image, height, width), height, width)
        return pixels

    def encode_image(self, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = pipeline._encode_vae_image(images.to(pipeline.vae.dtype), generator=None).float()
        batch, channels, height, width = latents.shape
        ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, torch.float32)
        return pipeline._pack_latents(latents, batch, channels, height, width), ids

    def _reference_ids(self, ids: Tensor) -> Tensor:
        # Kontext distinguishes the reference image from the noisy one by the first coordinate.
        ids = ids.clone()
        ids[:, 0] = 1
        return ids

    def training_inputs(
        self, pipeline: Any, noisy: Tensor, reference: Tensor, ids: Tensor, text: Mapping[str, Tensor], sigma: Tensor
    ) -> dict[str, Tensor]:
        inputs = {
            **text,
            "hidden_states": torch.cat([noisy, reference], dim=1),
            "timestep": sigma,
            "img_ids": torch.cat([ids, self._reference_ids(ids)]),
        }
        if pipeline.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.full_like(sigma, self.guidance_scale)
        return inputs

    @torch.no_grad()
    def encode_sources(self, pipeline: Any, images: Sequence[Image.Image]) -> EncodedImages:
        (image,) = images
        pixels = self.preprocess(pipeline, image).to(pipeline.vae.device)
        reference, ids = self.encode_image(pipeline, pixels)
        height, width = pixels.shape[-2:]
        sizes = ((height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor),)
        return EncodedImages(reference, {"img_ids": torch.cat([ids, self._reference_ids(ids)])}, sizes, height, width)

    def latent_grid(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        grid: Tensor = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        return grid

    def decode_pixels(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        vae = pipeline.vae
        unpacked = self.latent_grid(pipeline, latents, height, width) / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(unpacked.to(vae.dtype), return_dict=False)[0]
        return pixels

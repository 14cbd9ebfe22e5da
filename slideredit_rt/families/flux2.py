"""FLUX.2-klein: dual-stream and single-stream blocks with shared modulation, Qwen3 text rows, one or several images.

Distilled checkpoints edit in few steps without guidance. The others (`base`) run a negative pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families.base import EncodedImages, Family, Kind, RowSet, TensorSpec, in_blocks
from slideredit_rt.spans import PromptToken

_TEXT_LINEARS = r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.linear_(in|out))"
_IMAGE_LINEARS = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.linear_(in|out))"
_JOINT_LINEARS = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
# Positions of a row: image number, y, x and number in the text.
_AXES = 4
# Rows of the source images are numbered 10, 20, … on the first axis; those of the noisy image 0.
_IMAGE_STEP = 10
_SMALLEST_SIDE, _LARGEST_ASPECT = 64, 8
# A character that no prompt contains, which marks the place of the prompt in the chat template.
_PLACE = "\ue000"

# Names of Black Forest Labs' own files. In the last norm, they put the shift before the scale.
_ORIGINAL_SHARED = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_ORIGINAL_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": ("attn.norm_q.weight",),
    "img_attn.norm.key_norm.scale": ("attn.norm_k.weight",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q.weight",),
    "txt_attn.norm.key_norm.scale": ("attn.norm_added_k.weight",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_ORIGINAL_SINGLE = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm.scale": ("attn.norm_q.weight",),
    "norm.key_norm.scale": ("attn.norm_k.weight",),
}


class Flux2(Family):
    """The FLUX.2 family: FLUX.2-klein of 4 and 9 billion parameters, distilled and base."""

    name = "flux2"
    pipeline_classes = ("Flux2KleinPipeline",)
    guidance_scale = None
    # Settings of the model cards: 4 steps for distilled checkpoints, 50 with guidance 4 for the others.
    num_inference_steps = 4
    neutral_prompt = "keep the image the same"
    sized_by = 0
    keeps_small_images = True
    linears: ClassVar[Mapping[RowSet, str]] = {"text": _TEXT_LINEARS, "image": _IMAGE_LINEARS, "joint": _JOINT_LINEARS}
    joint_projections: ClassVar = {
        "to_qkv": ("to_q", "to_k", "to_v"),
        "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    no_float16 = "its activations can exceed 65504, the largest float16 value, and diffusers would clip them"
    # The gated feed-forward layer is three times as wide as the model.
    proportions: ClassVar = {
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_in": Fraction(6),
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_out": Fraction(1, 3),
        r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj": Fraction(9),
        r"single_transformer_blocks\.\d+\.attn\.to_out": Fraction(1, 4),
    }
    original_names: ClassVar = {
        **_ORIGINAL_SHARED,
        **in_blocks("double_blocks", "transformer_blocks", _ORIGINAL_DOUBLE),
        **in_blocks("single_blocks", "single_transformer_blocks", _ORIGINAL_SINGLE),
    }
    swapped_halves = ("norm_out.linear",)
    modulation = r"(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear"

    def default_steps(self, pipeline: Any) -> int:
        return self.num_inference_steps if pipeline.config.is_distilled else 50

    def default_true_cfg_scale(self, pipeline: Any) -> float:
        return 1.0 if pipeline.config.is_distilled else 4.0

    def targets(self, kind: Kind, *, all_projections: bool = False) -> re.Pattern[str]:
        # On the models of 4 and 9 billion parameters: 30 and 48 linears for ST, 70 and 96 with joint rows, 100 and 144 for GST.
        if kind == "st":
            return re.compile(f"{_TEXT_LINEARS}|{_JOINT_LINEARS}" if all_projections else _TEXT_LINEARS)
        return re.compile(f"{_TEXT_LINEARS}|{_IMAGE_LINEARS}|{_JOINT_LINEARS}")

    def input_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        return [
            TensorSpec("hidden_states", "float32", ("batch", "image_rows", config["in_channels"])),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "text_rows", config["joint_attention_dim"])),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("img_ids", "float32", ("image_rows", _AXES)),
            TensorSpec("txt_ids", "float32", ("text_rows", _AXES)),
        ]

    def output_spec(self, config: Mapping[str, Any]) -> TensorSpec:
        channels = config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"])
        return TensorSpec("sample", "float32", ("batch", "image_rows", channels))

    def random_inputs(
        self, config: Mapping[str, Any], batch: int, text_rows: int, image_rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        row, noisy = torch.arange(image_rows), max(1, image_rows // 2)
        side = max(1, int(noisy**0.5))
        ids = [row // noisy * _IMAGE_STEP, row % noisy // side, row % side, torch.zeros(image_rows)]
        return {
            "hidden_states": torch.randn(batch, image_rows, config["in_channels"], generator=generator),
            "encoder_hidden_states": torch.randn(batch, text_rows, config["joint_attention_dim"], generator=generator),
            "timestep": torch.rand(batch, generator=generator),
            "img_ids": torch.stack(ids, dim=1).float(),
            "txt_ids": torch.arange(text_rows, dtype=torch.float32)[:, None] * torch.tensor([0.0, 0.0, 0.0, 1.0]),
        }

    def run(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = next(transformer.parameters()).dtype
        cast = {name: inputs[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states")}
        output: Tensor = transformer(**{**inputs, **cast}, return_dict=False)[0]
        return output

    def takes_several_images(self, pipeline: Any) -> bool:
        return True

    def max_text_rows(self, pipeline: Any) -> int:
        # Prompts are always padded to this number, because the backbone also attends to the padding.
        return min(int(pipeline.tokenizer_max_length), int(pipeline.tokenizer.model_max_length))

    def _templated(self, pipeline: Any, prompt: str) -> tuple[str, int]:
        """Return a prompt in the text encoder's chat template, and the index of its first character there."""

        def fill(content: str) -> str:
            message = [{"role": "user", "content": content}]
            text: str = pipeline.tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            return text

        before, place, after = fill(_PLACE).partition(_PLACE)
        text = fill(prompt)
        if not place or text != f"{before}{prompt}{after}":
            raise SliderEditError(
                f"this base's chat template changes the prompt {prompt!r}, so its tokens cannot be found; reword the prompt"
            )
        return text, len(before)

    def tokenize(self, pipeline: Any, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        tokenizer = pipeline.tokenizer
        text, first = self._templated(pipeline, prompt)
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        added = set(tokenizer.added_tokens_decoder)
        tokens = []
        for row, (number, (start, end)) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            # A line break at the beginning of the prompt may share a token with the template's.
            start, end = max(start - first, 0), min(end - first, len(prompt))
            if start >= end:
                continue
            if number in added:
                raise SliderEditError(
                    f"the prompt contains {prompt[start:end]!r}, a special token of this base's text encoder; remove it"
                )
            tokens.append(PromptToken(prompt[start:end], start, end, row))
        return tokens

    def encode_prompt(
        self, pipeline: Any, prompts: list[str], text_rows: int, images: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Tensor]:
        """Encode prompts in the chat template, padded to `text_rows` rows (see `Family.encode_prompt`).

        Raises:
            SliderEditError: A prompt needs more than `text_rows` rows, or the tokenizer pads on the left.
        """
        tokenizer = pipeline.tokenizer
        if tokenizer.padding_side != "right":
            raise SliderEditError(
                "this base's tokenizer pads on the left, which moves the rows of prompts; set padding_side to right in "
                "tokenizer/tokenizer_config.json of the base"
            )
        for prompt in prompts:
            needed = len(tokenizer(self._templated(pipeline, prompt)[0], verbose=False)["input_ids"])
            if needed > text_rows:
                raise SliderEditError(
                    f"the prompt and its chat template need {needed} text rows, but this base reads {text_rows}; "
                    "shorten the prompt"
                )
        # The device is given, because diffusers would take that of an encoder, whose weights may be elsewhere.
        embeds, ids = pipeline.encode_prompt(prompt=prompts, device=pipeline.vae.device, max_sequence_length=text_rows)
        return {"encoder_hidden_states": embeds.float(), "txt_ids": ids[0].float()}

    def preprocess(self, pipeline: Any, image: Image.Image) -> Tensor:
        """Shrink an image that is larger than the base edits and crop it to whole patches; return `[1, 3, H, W]` in [−1, 1]."""
        shown = f"the image of {image.width}×{image.height} pixels"
        if min(image.size) < _SMALLEST_SIDE:
            raise SliderEditError(f"{shown} is too small to edit: each side needs {_SMALLEST_SIDE}; enlarge it")
        if max(image.size) > _LARGEST_ASPECT * min(image.size):
            raise SliderEditError(f"{shown} is too narrow to edit: its aspect ratio exceeds {_LARGEST_ASPECT}:1; crop it")
        processor, multiple = pipeline.image_processor, 2 * pipeline.vae_scale_factor
        image = processor._resize_if_exceeds_area(image, self.side(pipeline) ** 2)
        width, height = (side // multiple * multiple for side in image.size)
        pixels: Tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
        return pixels

    def encode_image(self, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = pipeline._encode_vae_image(images.to(pipeline.vae.dtype), generator=None).float()
        ids = pipeline._prepare_latent_ids(latents)[0].float().to(latents.device)
        return pipeline._pack_latents(latents), ids

    def training_inputs(
        self, pipeline: Any, noisy: Tensor, reference: Tensor, ids: Tensor, text: Mapping[str, Tensor], sigma: Tensor
    ) -> dict[str, Tensor]:
        return {
            **text,
            "hidden_states": torch.cat([noisy, reference], dim=1),
            "timestep": sigma,
            "img_ids": torch.cat([ids, number_ids(ids, 1)]),
        }

    @torch.no_grad()
    def encode_sources(self, pipeline: Any, images: Sequence[Image.Image]) -> EncodedImages:
        pixels = [self.preprocess(pipeline, image).to(pipeline.vae.device) for image in images]
        latents, ids = zip(*(self.encode_image(pipeline, one) for one in pixels), strict=True)
        # The edited image has the shape of the first source image.
        height, width = pixels[self.sized_by].shape[-2:]
        joint = torch.cat([ids[self.sized_by], *(number_ids(one, number) for number, one in enumerate(ids, 1))])
        factor = pipeline.vae_scale_factor
        sizes = tuple((one.shape[-2] // factor, one.shape[-1] // factor) for one in pixels)
        return EncodedImages(torch.cat(latents, dim=1), {"img_ids": joint}, sizes, height, width)

    def draw_noise(self, pipeline: Any, height: int, width: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(seed))
        shape = (1, int(pipeline.vae.config.latent_channels), height, width)
        latents: Tensor = pipeline.prepare_latents(*shape, torch.float32, torch.device("cpu"), generator)[0]
        return latents

    def shift(self, config: Mapping[str, Any], latent_rows: int, steps: int) -> float:
        return float(compute_empirical_mu(latent_rows, steps))

    def latent_grid(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        grid: Tensor = pipeline._unpatchify_latents(_patches(pipeline, latents, height, width))
        return grid

    def decode_pixels(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        vae, grid = pipeline.vae, _patches(pipeline, latents, height, width)
        mean, variance = (value.to(grid)[:, None, None] for value in (vae.bn.running_mean, vae.bn.running_var))
        grid = grid * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        pixels: Tensor = vae.decode(pipeline._unpatchify_latents(grid).to(vae.dtype), return_dict=False)[0]
        return pixels


def _patches(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Arrange latents `[B, rows, C]` of an image with this size in pixels as a grid of 2×2 patches, `[B, C, h, w]`."""
    patch = 2 * pipeline.vae_scale_factor
    return latents.transpose(1, 2).unflatten(2, (height // patch, width // patch))


def number_ids(ids: Tensor, number: int) -> Tensor:
    """Return position ids of a noisy image's rows, `[rows, 4]`, as those of the source image with this number, from 1."""
    ids = ids.clone()
    ids[:, 0] = _IMAGE_STEP * number
    return ids

"""Qwen-Image-Edit: 60 dual-stream blocks and true classifier-free guidance.

Its text rows come from a vision-language model that reads the chat template, the images and the prompt. With
`QwenImageEditPlusPipeline` (2509, 2511), an edit takes several images.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from transformers import Qwen2VLProcessor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families.base import Conditioning, EncodedImages, Family, Kind, RowSet, TensorSpec
from slideredit_rt.spans import PromptToken

_TEXT_LINEARS = r"transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|txt_mlp\.net\.(0\.proj|2))"
_IMAGE_LINEARS = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.net\.(0\.proj|2))"
# The Plus pipeline puts this line ahead of the prompt for each image.
_IMAGE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
_IMAGE_TOKEN = "<|image_pad|>"
_ROTARY_ROWS = 4096  # positions that diffusers has rotary frequencies for
_ROTARY_THETA = 10000.0
_MASK = "encoder_hidden_states_mask"
"""Rows that belong to each prompt, bool `[batch, text_rows]`: an input of `run` for prompts that were padded to one length.

Engines do not have it. They get prompts of one length in a call, and attention without a mask can use faster kernels.
"""


class SourceImageProcessor(Qwen2VLProcessor):
    """Transformers' processor without its video part, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        # Transformers derives the components of a processor from the names of these parameters.
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


@dataclasses.dataclass(frozen=True, eq=False)
class _JointRows:
    """Tensors that describe the rows of a call, text rows first. They replace diffusers' `img_shapes`.

    Attributes:
        cos: Rotary cosines, float32 `[text_rows + image_rows, attention_head_dim / 2]`.
        sin: Rotary sines, float32 `[text_rows + image_rows, attention_head_dim / 2]`.
        mask: Rows that are attended to, bool `[batch, 1, 1, text_rows + image_rows]`; None for all of them.
        reference: Rows that are modulated with timestep 0, bool `[image_rows]`; None for a base without them.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    reference: Tensor | None

    def __iter__(self) -> Iterator[Any]:
        # A transformer with `zero_cond_t` iterates over the image shapes to make an index, which `_give_reference_rows`
        # replaces.
        return iter(())


class _RotaryInputs(nn.Module):
    """Position embedding that passes on tables that are inputs of the call."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, shapes: Any, **options: Any) -> Any:
        return shapes if isinstance(shapes, _JointRows) else self.original(shapes, **options)


class _RealRotaryProcessor(QwenDoubleStreamAttnProcessor2_0):
    """Joint attention with real-valued rotary tables, because TensorRT does not support complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(image_rotary_emb, _JointRows):
            output: tuple[Tensor, Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
            return output
        rows, text, image = image_rotary_emb, encoder_hidden_states, hidden_states
        heads = (attn.heads, -1)
        query = torch.cat(
            [
                attn.norm_added_q(attn.add_q_proj(text).unflatten(-1, heads)),
                attn.norm_q(attn.to_q(image).unflatten(-1, heads)),
            ],
            dim=1,
        )
        key = torch.cat(
            [
                attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, heads)),
                attn.norm_k(attn.to_k(image).unflatten(-1, heads)),
            ],
            dim=1,
        )
        value = torch.cat([attn.add_v_proj(text), attn.to_v(image)], dim=1).unflatten(-1, heads)
        attended = dispatch_attention_fn(
            _rotate(query, rows),
            _rotate(key, rows),
            value,
            attn_mask=rows.mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        attended = attended.flatten(2).to(query.dtype)
        text_rows = text.shape[1]
        return attn.to_out[0](attended[:, text_rows:].contiguous()), attn.to_add_out(attended[:, :text_rows].contiguous())


def _rotate(x: Tensor, rows: _JointRows) -> Tensor:
    """Rotate neighbouring pairs of channels of x `[B, rows, heads, channels]`, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rows.cos[:, None], rows.sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


def _give_reference_rows(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the index of rows that are modulated with timestep 0 to a block (a forward pre-hook)."""
    # Gradient checkpointing passes all arguments by position, the index last.
    rows = kwargs.get("image_rotary_emb", args[4] if args else None)
    if not isinstance(rows, _JointRows):
        return args, kwargs
    return ((*args[:-1], rows.reference), kwargs) if args else (args, kwargs | {"modulate_index": rows.reference})


class _HalveBatch(TorchFunctionMode):
    """Replacement of `chunk` by slicing: tracing cannot prove that `chunk` of a dynamic batch 2 B gives two parts."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.chunk, Tensor.chunk) and args[1] == 2 and kwargs.get("dim") == 0:
            half = args[0].shape[0] // 2
            return args[0][:half], args[0][half:]
        return func(*args, **kwargs)


def _positions(height: int, width: int, image: int) -> Tensor:
    """Return rotary positions of an image's rows, float32 `[height · width, 3]`: image number, y and x from the centre."""
    y, x = (torch.arange(size, dtype=torch.float32) - (size - size // 2) for size in (height, width))
    return torch.cartesian_prod(torch.tensor([float(image)]), y, x)


def _tables(config: Mapping[str, Any], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of float32 positions `[rows, 3]`, each float32 `[rows, attention_head_dim / 2]`."""
    angles = []
    for axis, channels in enumerate(config["axes_dims_rope"]):
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
        angles.append(torch.outer(positions[:, axis], 1.0 / torch.pow(_ROTARY_THETA, exponents)))
    joint = torch.cat(angles, dim=1)
    return joint.cos(), joint.sin()


def _row_inputs(config: Mapping[str, Any], positions: Tensor, text_rows: int) -> dict[str, Tensor]:
    """Return the backbone inputs that describe rows, from the positions of the image rows.

    The positions of text rows continue from the largest coordinate of any image, equal on all three axes.
    """
    first = positions[:, 1:].max() + 1
    text = (first + torch.arange(text_rows, dtype=torch.float32, device=positions.device))[:, None].expand(-1, 3)
    inputs = {}
    inputs["image_rotary_cos"], inputs["image_rotary_sin"] = _tables(config, positions)
    inputs["text_rotary_cos"], inputs["text_rotary_sin"] = _tables(config, text)
    if config.get("zero_cond_t"):
        inputs["reference_rows"] = positions[:, 0] > 0
    return inputs


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number per channel as `[C, 1, 1, 1]`, kept on the device from one decoding to the next."""
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None, None]


class QwenImageEdit(Family):
    """The Qwen-Image-Edit family."""

    name = "qwen_image_edit"
    pipeline_classes = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    # The paper's inference settings for Qwen-Image-Edit.
    guidance_scale = None
    true_cfg_scale = 4.0
    num_inference_steps = 40
    linears: ClassVar[Mapping[RowSet, str]] = {"text": _TEXT_LINEARS, "image": _IMAGE_LINEARS}
    neutral_prompt = "keep the image the same"
    negative_prompt = " "
    # An image of 1024² pixels takes about 1,370 text rows.
    usual_text_rows = 1536
    text_reads_images = True
    modulation = r"transformer_blocks\.\d+\.(img|txt)_mod\.1"
    component_classes: ClassVar[Mapping[str, Any]] = {"processor": SourceImageProcessor}

    def prepare_transformer(self, transformer: Any) -> None:
        if isinstance(transformer.pos_embed, _RotaryInputs):
            return
        transformer.pos_embed = _RotaryInputs(transformer.pos_embed)
        for block in transformer.transformer_blocks:
            block.attn.set_processor(_RealRotaryProcessor())
            if transformer.zero_cond_t:
                block.register_forward_pre_hook(_give_reference_rows, with_kwargs=True)

    def targets(self, kind: Kind, *, all_projections: bool = False) -> re.Pattern[str]:
        # 360 and 720 linears on the full model; there are no further projections.
        return re.compile(_TEXT_LINEARS if kind == "st" else f"{_TEXT_LINEARS}|{_IMAGE_LINEARS}")

    def keeps_precision(self, module_name: str, config: Mapping[str, Any]) -> bool:
        # The first two and the last two blocks, as in ModelOpt's recipe for the model of 60 blocks.
        block, count = re.match(r"transformer_blocks\.(\d+)\.", module_name), config["num_layers"]
        return block is not None and count > 4 and int(block[1]) not in range(2, count - 2)

    def input_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        half = sum(config["axes_dims_rope"]) // 2
        specs = [
            TensorSpec("hidden_states", "float32", ("batch", "image_rows", config["in_channels"])),
            TensorSpec("encoder_hidden_states", "float32", ("batch", "text_rows", config["joint_attention_dim"])),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("image_rotary_cos", "float32", ("image_rows", half)),
            TensorSpec("image_rotary_sin", "float32", ("image_rows", half)),
            TensorSpec("text_rotary_cos", "float32", ("text_rows", half)),
            TensorSpec("text_rotary_sin", "float32", ("text_rows", half)),
        ]
        return [*specs, TensorSpec("reference_rows", "bool", ("image_rows",))] if config.get("zero_cond_t") else specs

    def output_spec(self, config: Mapping[str, Any]) -> TensorSpec:
        channels = config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"])
        return TensorSpec("sample", "float32", ("batch", "image_rows", channels))

    def random_inputs(
        self, config: Mapping[str, Any], batch: int, text_rows: int, image_rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        side = max(1, int((image_rows / 2) ** 0.5))
        row = torch.arange(image_rows)
        within = row % max(1, image_rows // 2)
        positions = torch.stack([row // max(1, image_rows // 2), within // side - side // 2, within % side - side // 2], dim=1)
        return {
            "hidden_states": torch.randn(batch, image_rows, config["in_channels"], generator=generator),
            "encoder_hidden_states": torch.randn(batch, text_rows, config["joint_attention_dim"], generator=generator),
            "timestep": torch.rand(batch, generator=generator),
            **_row_inputs(config, positions.float(), text_rows),
        }

    def run(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        dtype = next(transformer.parameters()).dtype
        hidden_states, text_mask = inputs["hidden_states"], inputs.get(_MASK)
        mask = None
        if text_mask is not None:
            mask = torch.cat([text_mask, text_mask.new_ones(hidden_states.shape[:2])], dim=1)[:, None, None]
        rows = _JointRows(
            cos=torch.cat([inputs["text_rotary_cos"], inputs["image_rotary_cos"]]),
            sin=torch.cat([inputs["text_rotary_sin"], inputs["image_rotary_sin"]]),
            mask=mask,
            reference=inputs.get("reference_rows"),
        )
        with _HalveBatch() if torch.compiler.is_exporting() else nullcontext():
            output: Tensor = transformer(
                hidden_states=hidden_states.to(dtype),
                encoder_hidden_states=inputs["encoder_hidden_states"].to(dtype),
                timestep=inputs["timestep"],
                img_shapes=rows,
                return_dict=False,
            )[0]
        return output

    def takes_several_images(self, pipeline: Any) -> bool:
        return isinstance(pipeline, QwenImageEditPlusPipeline)

    def max_text_rows(self, pipeline: Any) -> int:
        return min(_ROTARY_ROWS, int(pipeline.tokenizer.model_max_length)) - int(pipeline.prompt_template_encode_start_idx)

    def _size(self, pipeline: Any, image: Image.Image, *, vision: bool = False) -> tuple[int, int]:
        """Return the height and width to which diffusers resizes an image for the autoencoder or (`vision`) text encoder."""
        side = self.side(pipeline)
        if vision and self.takes_several_images(pipeline):
            side = side * 3 // 8  # 384 of 1024
        width, height = calculate_dimensions(side * side, image.width / image.height)
        if not width or not height:
            raise SliderEditError(f"the image of {image.width}×{image.height} pixels is too narrow to edit; crop it")
        return height, width

    def _vision_images(self, pipeline: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the images as the text encoder sees them; a black square if there are none."""
        images = images or [Image.new("RGB", (8, 8))]
        return [pipeline.image_processor.resize(image, *self._size(pipeline, image, vision=True)) for image in images]

    def tokenize(self, pipeline: Any, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        shown = self._vision_images(pipeline, images)
        template: str = pipeline.prompt_template_encode
        before = "".join(_IMAGE.format(i + 1) for i in range(len(shown))) if _IMAGE_TOKEN not in template else ""
        tokenizer, image_processor = pipeline.processor.tokenizer, pipeline.processor.image_processor
        encoded = tokenizer(template.format(before + prompt), return_offsets_mapping=True, verbose=False)
        # The single token of each image is expanded to one per merged patch, all ahead of the prompt.
        patches = image_processor(images=shown, return_tensors="pt")["image_grid_thw"].prod(dim=1)
        grown = int((patches // image_processor.merge_size**2 - 1).sum())
        first = template.index("{}") + len(before)
        special = set(tokenizer.added_tokens_decoder)
        tokens = []
        for index, (number, (start, end)) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            if first <= start and end <= first + len(prompt):
                start, end = start - first, end - first
                if number in special:
                    raise SliderEditError(
                        f"the prompt contains {prompt[start:end]!r}, a special token of this base's text encoder; remove it"
                    )
                row = index + grown - pipeline.prompt_template_encode_start_idx
                tokens.append(PromptToken(prompt[start:end], start, end, row))
        return tokens

    def encode_prompt(
        self, pipeline: Any, prompts: list[str], text_rows: int, images: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Tensor]:
        """Encode prompts with their images (see `Family.encode_prompt`).

        The result has only as many rows as the longest prompt needs. If others are shorter, it also has a mask of each
        prompt's rows.

        Raises:
            SliderEditError: A prompt and its images need more than `text_rows` rows.
        """
        embeds = []
        for index, prompt in enumerate(prompts):
            shown = self._vision_images(pipeline, images[index] if images else ())
            embeds.append(pipeline.encode_prompt(prompt, image=shown, device=pipeline.vae.device)[0][0].float())
        longest = max(map(len, embeds))
        if longest > text_rows:
            raise SliderEditError(
                f"the prompt and its images need {longest} text rows, but this base reads {text_rows}; shorten the prompt"
            )
        text = {"encoder_hidden_states": pad_sequence(embeds, batch_first=True)}
        if longest == min(map(len, embeds)):
            return text
        rows = [[row < len(e) for row in range(longest)] for e in embeds]
        return text | {_MASK: torch.tensor(rows, device=embeds[0].device)}

    def preprocess(self, pipeline: Any, image: Image.Image) -> Tensor:
        height, width = self._size(pipeline, image)
        pixels: Tensor = pipeline.image_processor.preprocess(image, height, width)
        return pixels

    def encode_image(self, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = pipeline._encode_vae_image(images[:, :, None].to(pipeline.vae.dtype), generator=None).float()
        batch, channels, _, height, width = latents.shape
        positions = _positions(height // 2, width // 2, image=0).to(latents.device)
        return pipeline._pack_latents(latents, batch, channels, height, width), positions

    def training_inputs(
        self, pipeline: Any, noisy: Tensor, reference: Tensor, ids: Tensor, text: Mapping[str, Tensor], sigma: Tensor
    ) -> dict[str, Tensor]:
        # The noisy image is number 0 and the reference is number 1.
        positions = torch.cat([ids, ids + ids.new_tensor([1, 0, 0])])
        return {
            **text,
            "hidden_states": torch.cat([noisy, reference], dim=1),
            "timestep": sigma,
            **_row_inputs(pipeline.transformer.config, positions, text["encoder_hidden_states"].shape[1]),
        }

    @torch.no_grad()
    def encode_sources(self, pipeline: Any, images: Sequence[Image.Image]) -> EncodedImages:
        pixels = [self.preprocess(pipeline, image).to(pipeline.vae.device) for image in images]
        reference = torch.cat([self.encode_image(pipeline, p)[0] for p in pixels], dim=1)
        sizes = [tuple(p.shape[-2:]) for p in pixels]
        # The edited image has the shape of the last source image.
        height, width = sizes[-1]
        patch = pipeline.vae_scale_factor * 2
        grids = [(h // patch, w // patch) for h, w in [(height, width), *sizes]]
        positions = torch.cat([_positions(h, w, index) for index, (h, w) in enumerate(grids)])
        latent_sizes = tuple((h // pipeline.vae_scale_factor, w // pipeline.vae_scale_factor) for h, w in sizes)
        return EncodedImages(reference, {"positions": positions.to(reference.device)}, latent_sizes, height, width)

    def batch_inputs(
        self, config: Mapping[str, Any], conditioning: Conditioning, alpha: Tensor, token_mask: Tensor
    ) -> dict[str, Tensor]:
        rows = _row_inputs(config, conditioning.inputs["positions"], conditioning.text_rows)
        with_rows = dataclasses.replace(conditioning, inputs=conditioning.inputs | rows)
        inputs = super().batch_inputs(config, with_rows, alpha, token_mask)
        padded = conditioning.inputs.get(_MASK)
        return inputs if padded is None else inputs | {_MASK: padded.expand(len(alpha), -1).contiguous()}

    def guide(self, prediction: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        """Apply guidance as diffusers does: extrapolate, then rescale each row to its norm without guidance."""
        guided = super().guide(prediction, negative, scale)
        before, after = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (prediction, guided))
        rescaled: Tensor = guided * (before / after)
        return rescaled

    def latent_grid(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        grid: Tensor = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)[:, :, 0]
        return grid

    def decode_pixels(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        vae = pipeline.vae
        unpacked = self.latent_grid(pipeline, latents, height, width)[:, :, None].to(vae.dtype)
        mean, std = (
            _channels(tuple(values), unpacked.device, unpacked.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels: Tensor = vae.decode(unpacked * std + mean, return_dict=False)[0][:, :, 0]
        return pixels

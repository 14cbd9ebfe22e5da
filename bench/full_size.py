"""Full-size bases with random bfloat16 weights, made on the device: speed and memory do not depend on the values of weights.

Nothing is downloaded or written. Sizes are those of the published configurations; tokenizers are small ones, because the
numbers of rows do not depend on their vocabularies. Every base also has a small form for rehearsals.
"""

from __future__ import annotations

import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar
from unittest import mock

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    FluxKontextPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from slideredit_rt.assets import resolve_base
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, get_family
from slideredit_rt.families.qwen_image_edit import SourceImageProcessor
from slideredit_rt.quantization.linear import QuantizedLinear, quantize_linears, quantized_linears
from slideredit_rt.quantization.precisions import get_precision
from slideredit_rt.quantization.selection import select_layers

DTYPE = torch.bfloat16
SIDE, SMALL_SIDE = 1024, 64
RANDOM_AMAX = 8.0
"""Largest activation to expect of a transformer with random weights."""
_NARROW = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14), "joint_attention_dim": 64}
_QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def fill(name: str, parameter: Tensor) -> None:
    """Fill a parameter with random values that depend on its name only, so they can be restored."""
    g = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
    if parameter.ndim >= 2:
        parameter.normal_(0, parameter[0].numel() ** -0.5, generator=g)
    else:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def fill_quantised(name: str, linear: QuantizedLinear, device: torch.device) -> None:
    """Quantise the random weight of a linear on the device.

    The scale of activations is a constant that covers values up to `RANDOM_AMAX`, because the time of a product does not depend
    on values. A calibration would take a forward pass of the unquantised transformer.
    """
    form = get_precision(linear.precision)
    weight = torch.empty(linear.out_features, linear.in_features, dtype=DTYPE, device=device)
    fill(f"{name}.weight", weight)
    parts = form.quantise(weight.float())
    if linear.activations:
        parts["input_scale"] = torch.tensor(form.input_scale(RANDOM_AMAX), device=device)
    for part, tensor in parts.items():
        setattr(linear, part, tensor)


@torch.no_grad()
def materialise(module: nn.Module, device: torch.device) -> Any:
    """Create random weights on the device for a module whose parameters are on `meta`.

    Weights of quantised linears have the same values, quantised one at a time, so there is never a second set of weights.
    """
    for name, linear in quantized_linears(module).items():
        fill_quantised(name, linear, device)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        filled = torch.empty(parameter.shape, dtype=DTYPE, device=device)
        fill(name, filled)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(filled, requires_grad=False))
    return tie(module).to(device).eval()


def tie(module: nn.Module) -> nn.Module:
    """Share the weights that a transformers model shares, which modules built on `meta` do not."""
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()
    return module


def qwen_tokenizer(template: str, corpus: Iterable[str], max_length: int) -> transformers.Qwen2Tokenizer:
    """Train a small tokenizer with Qwen2's rules in which the words of a chat template are tokens.

    The template's prefix then has the same number of tokens as with the released tokenizer, which the pipeline relies on.

    Args:
        template: Prompt template of a pipeline.
        corpus: Texts that the vocabulary is learnt from, besides the template.
        max_length: Largest number of tokens.
    """
    untrained = transformers.Qwen2Tokenizer()
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = untrained.backend_tokenizer.pre_tokenizer
    pieces = re.split(r"<\|\w+\|>|\{\}", template)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([*pieces, *corpus], trainer)
    model = json.loads(raw.to_str())["model"]
    return transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=list(_QWEN_SPECIAL_TOKENS[1:]),
        model_max_length=max_length,
    )


def qwen3_tokenizer(corpus: Iterable[str], max_length: int) -> transformers.Qwen2Tokenizer:
    """Train a small tokenizer with a chat template like Qwen3's: a user's turn, then an assistant's with an empty thought.

    Args:
        corpus: Texts that the vocabulary is learnt from, besides the template.
        max_length: Largest number of tokens.
    """
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    tokenizer = qwen_tokenizer(turn.format("user", "{}") + "<|im_start|>assistant\n", corpus, max_length)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    )
    return tokenizer


def noise_image(side: int) -> Image.Image:
    """Make a noisy RGB image of `side` × `side` pixels."""
    return Image.effect_noise((side, side), 60).convert("RGB")


class FullSize(ABC):
    """A base with random weights.

    Attributes:
        name: Name in commands and in results.
        family_name: Name of its family.
        transformer_class: Name of the transformer's class in diffusers.
        full: Differences of the full-size transformer's configuration from the defaults of its class.
        narrow: The same for the small transformer.
        gib: GPU memory that whole edits need, in GiB, named when there is too little.
        steps: Denoising steps of an edit in `make gpu-e2e`, limited by the time that the bench may take.
        batch: Largest batch of `make gpu-e2e`: 7 to time a sweep in one batch, or 1 where compiling for it would take too long.
    """

    name: ClassVar[str]
    family_name: ClassVar[str]
    transformer_class: ClassVar[str]
    full: ClassVar[Mapping[str, Any]]
    narrow: ClassVar[Mapping[str, Any]]
    gib: ClassVar[int]
    steps: ClassVar[int]
    batch: ClassVar[int]

    @property
    def family(self) -> Family:
        """Family of the base."""
        return get_family(self.family_name)

    def transformer(self, *, small: bool, device: torch.device, precision: str | None = None) -> Any:
        """Create the transformer.

        Args:
            small: Create the small one.
            device: Device of its weights.
            precision: Precision of the linears that `slideredit-rt quantize` would quantise; None quantises none.
        """
        with init_empty_weights():
            transformer = getattr(diffusers, self.transformer_class)(**(self.narrow if small else self.full))
        if precision is not None:
            quantize_linears(transformer, select_layers(self.family, transformer, precision))
        return materialise(transformer, device)

    @abstractmethod
    def pipeline(self, *, small: bool, device: torch.device) -> Any:
        """Create the diffusers pipeline, with encoders and autoencoder."""

    def edits_of(self, side: int) -> AbstractContextManager[Any]:
        """Return a context in which diffusers' own pipeline edits at `side` × `side` pixels."""
        return nullcontext()

    @abstractmethod
    def options(self, pipeline: Any, true_cfg_scale: float) -> dict[str, Any]:
        """Return the arguments of a call of diffusers' pipeline besides image, steps and prompts."""

    @abstractmethod
    def embeddings(self, pipeline: Any, image: Image.Image, prompt: str, negative: str | None) -> dict[str, Any]:
        """Encode prompts with diffusers, as arguments of its pipeline that replace them.

        Args:
            pipeline: diffusers pipeline.
            image: Source image, which some text encoders read.
            prompt: Prompt of the edit.
            negative: Prompt of the negative pass; None without one.
        """


class FluxKontextBase(FullSize):
    """FLUX.1-Kontext: T5-XXL and CLIP-L, 12 billion parameters in 57 blocks, an autoencoder of factor 8."""

    name = family_name = "flux_kontext"
    transformer_class = "FluxTransformer2DModel"
    full: ClassVar[Mapping[str, Any]] = {"guidance_embeds": True}
    narrow: ClassVar[Mapping[str, Any]] = _NARROW | {
        "guidance_embeds": True,
        "num_layers": 2,
        "num_single_layers": 2,
        "pooled_projection_dim": 32,
    }
    gib, steps, batch = 48, 28, 7

    def encoders(self, *, small: bool, device: torch.device) -> tuple[Any, Any, Any]:
        """Create the T5 encoder, the CLIP text encoder and the autoencoder."""
        t5 = {"d_model": 64, "num_layers": 1} if small else {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        narrow_clip = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
        clip = narrow_clip if small else {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        with init_empty_weights():
            text = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **t5))
            pooled = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip))
            vae = AutoencoderKL(
                block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512),
                layers_per_block=1 if small else 2,
                latent_channels=16,
                sample_size=SMALL_SIDE if small else SIDE,
                shift_factor=0.1159,
                scaling_factor=0.3611,
                **blocks,
            )
        return materialise(text, device), materialise(pooled, device), materialise(vae, device)

    def pipeline(self, *, small: bool, device: torch.device) -> Any:
        embedded = self.family.load_pipeline(resolve_base("shapes-kontext"), transformer=False)
        embedded.tokenizer_2.model_max_length = 16 if small else 512
        text, pooled, vae = self.encoders(small=small, device=device)
        return FluxKontextPipeline(
            scheduler=embedded.scheduler,
            vae=vae,
            text_encoder=pooled,
            tokenizer=embedded.tokenizer,
            text_encoder_2=text,
            tokenizer_2=embedded.tokenizer_2,
            transformer=self.transformer(small=small, device=device),
        )

    def options(self, pipeline: Any, true_cfg_scale: float) -> dict[str, Any]:
        side = self.family.side(pipeline)
        return {
            "guidance_scale": self.family.guidance_scale,
            "true_cfg_scale": true_cfg_scale,
            "max_sequence_length": self.family.max_text_rows(pipeline),
            "max_area": side * side,
            "height": side,
            "width": side,
            "_auto_resize": False,
        }

    def embeddings(self, pipeline: Any, image: Image.Image, prompt: str, negative: str | None) -> dict[str, Any]:
        rows = self.family.max_text_rows(pipeline)
        found: dict[str, Any] = {}
        for prefix, text in (("", prompt), ("negative_", negative)):
            if text is not None:
                embeds, pooled, _ = pipeline.encode_prompt(prompt=text, prompt_2=None, max_sequence_length=rows)
                found |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
        return found


class QwenImageEditBase(FullSize):
    """Qwen-Image-Edit: Qwen2.5-VL of 7 billion parameters, 20 billion in 60 blocks, an autoencoder of factor 8."""

    name = family_name = "qwen_image_edit"
    transformer_class = "QwenImageTransformer2DModel"
    full: ClassVar[Mapping[str, Any]] = {}
    narrow: ClassVar[Mapping[str, Any]] = _NARROW | {"num_layers": 2}
    gib, steps, batch = 80, 12, 1
    pipeline_class: ClassVar[Any] = diffusers.QwenImageEditPipeline
    module: ClassVar[Any] = pipeline_qwenimage_edit

    def text_encoder(self, tokenizer: Any, *, small: bool, device: torch.device) -> Any:
        """Create Qwen2.5-VL for a tokenizer."""
        ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
        sizes = (64, 128, 2, 2, 1) if small else (3584, 18944, 28, 28, 4)
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        text = dict(zip(names, sizes, strict=True)) | {
            "vocab_size": len(tokenizer) if small else 152064,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6] if small else [16, 24, 24]},
            "rms_norm_eps": 1e-6,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        }
        vision = {"out_hidden_size": text["hidden_size"]}
        if small:
            vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
            vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
        else:
            vision |= {"hidden_size": 1280}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            tie_word_embeddings=False,
        )
        with init_empty_weights():
            encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
        return materialise(encoder, device)

    def autoencoder(self, *, small: bool, device: torch.device) -> Any:
        """Create the autoencoder."""
        sizes = {"base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
        with init_empty_weights():
            vae = AutoencoderKLQwenImage(**(sizes if small else {}))
        vae.register_to_config(sample_size=SMALL_SIDE if small else SIDE)
        return materialise(vae, device)

    def pipeline(self, *, small: bool, device: torch.device) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        )
        # The template is an attribute of instances only.
        template = self.pipeline_class(scheduler, None, None, None, None, None).prompt_template_encode
        tokenizer = qwen_tokenizer(template, (), 256 if small else 131072)
        patch = {"patch_size": 4, "merge_size": 2} if small else {"patch_size": 14, "merge_size": 2}
        area = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32} if small else {"shortest_edge": 3136, "longest_edge": 12845056}
        processor = SourceImageProcessor(transformers.Qwen2VLImageProcessorPil(**patch, size=area), tokenizer)
        return self.pipeline_class(
            scheduler=scheduler,
            vae=self.autoencoder(small=small, device=device),
            text_encoder=self.text_encoder(tokenizer, small=small, device=device),
            tokenizer=tokenizer,
            processor=processor,
            transformer=self.transformer(small=small, device=device),
        )

    def edits_of(self, side: int) -> AbstractContextManager[Any]:
        original = self.module.calculate_dimensions
        # The areas are constants in diffusers.
        return mock.patch.object(
            self.module, "calculate_dimensions", lambda area, ratio: original(area * side**2 // SIDE**2, ratio)
        )

    def options(self, pipeline: Any, true_cfg_scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": true_cfg_scale}

    def embeddings(self, pipeline: Any, image: Image.Image, prompt: str, negative: str | None) -> dict[str, Any]:
        shown = self.family._vision_images(pipeline, [image])  # type: ignore[attr-defined]
        found: dict[str, Any] = {}
        for prefix, text in (("", prompt), ("negative_", negative)):
            if text is not None:
                embeds, mask = pipeline.encode_prompt(text, image=shown)
                found |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
        return found


class QwenImageEditPlusBase(QwenImageEditBase):
    """Qwen-Image-Edit-2509 and 2511, whose text encoder reads images at 384² instead of 1024²."""

    name = "qwen_image_edit_plus"
    pipeline_class = diffusers.QwenImageEditPlusPipeline
    module = pipeline_qwenimage_edit_plus


class Flux2Klein4B(FullSize):
    """FLUX.2-klein of 4 billion parameters in 25 blocks, distilled: Qwen3 of 4 billion, an autoencoder of factor 8."""

    name, family_name = "flux2_klein_4b", "flux2"
    transformer_class = "Flux2Transformer2DModel"
    full: ClassVar[Mapping[str, Any]] = {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 3 * 2560,
        "guidance_embeds": False,
    }
    narrow: ClassVar[Mapping[str, Any]] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 8, 8, 8),
        "joint_attention_dim": 3 * 64,
        "guidance_embeds": False,
    }
    gib, steps, batch = 24, 4, 7
    encoder: ClassVar[Mapping[str, Any]] = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
    pipeline_class: ClassVar[Any] = Flux2KleinPipeline
    pipeline_options: ClassVar[Mapping[str, Any]] = {"is_distilled": True}

    def text_encoder(self, tokenizer: Any, *, small: bool, device: torch.device) -> Any:
        """Create Qwen3 for a tokenizer. The pipeline reads its layers 9, 18 and 27."""
        full = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
        narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        narrow |= {"vocab_size": len(tokenizer), "num_hidden_layers": 27, "tie_word_embeddings": True}
        sizes = narrow if small else full | dict(self.encoder)
        with init_empty_weights():
            config = transformers.Qwen3Config(head_dim=32 if small else 128, bos_token_id=None, eos_token_id=None, **sizes)
            encoder = transformers.Qwen3ForCausalLM(config)
        return materialise(encoder, device)

    def autoencoder(self, *, small: bool, device: torch.device) -> Any:
        """Create the autoencoder."""
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        sizes = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "latent_channels": 4, "sample_size": SMALL_SIDE}
        with init_empty_weights():
            vae = AutoencoderKLFlux2(**blocks, **(sizes if small else {}))
        return materialise(vae, device)

    def pipeline(self, *, small: bool, device: torch.device) -> Any:
        tokenizer = qwen3_tokenizer((), 128 if small else 131072)
        return self.pipeline_class(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=self.autoencoder(small=small, device=device),
            text_encoder=self.text_encoder(tokenizer, small=small, device=device),
            tokenizer=tokenizer,
            transformer=self.transformer(small=small, device=device),
            **self.pipeline_options,
        )

    def options(self, pipeline: Any, true_cfg_scale: float) -> dict[str, Any]:
        if true_cfg_scale > 1:
            raise SliderEditError(f"{self.name} is distilled, and diffusers ignores its guidance; leave --true-cfg-scale out")
        return {"guidance_scale": true_cfg_scale, "max_sequence_length": self.family.max_text_rows(pipeline)}

    def embeddings(self, pipeline: Any, image: Image.Image, prompt: str, negative: str | None) -> dict[str, Any]:
        rows = self.family.max_text_rows(pipeline)
        return {"prompt_embeds": pipeline.encode_prompt(prompt, max_sequence_length=rows)[0]}


class Flux2Klein9B(Flux2Klein4B):
    """FLUX.2-klein of 9 billion parameters in 32 blocks, distilled: Qwen3 of 8 billion."""

    name = "flux2_klein_9b"
    full: ClassVar[Mapping[str, Any]] = {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 3 * 4096,
        "guidance_embeds": False,
    }
    gib = 48
    encoder: ClassVar[Mapping[str, Any]] = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


class ReadsImagesOnce(Flux2Klein4B):
    """FLUX.2-klein with a key-value cache, which reads the source image once per edit."""

    family_name = "flux2_kv"
    pipeline_class = Flux2KleinKVPipeline
    pipeline_options: ClassVar[Mapping[str, Any]] = {}

    def options(self, pipeline: Any, true_cfg_scale: float) -> dict[str, Any]:
        given = super().options(pipeline, true_cfg_scale)
        del given["guidance_scale"]  # the pipeline has no such argument
        return given


class Flux2Klein4BKV(ReadsImagesOnce):
    """FLUX.2-klein of 4 billion parameters with a key-value cache."""

    name = "flux2_klein_4b_kv"


class Flux2Klein9BKV(ReadsImagesOnce, Flux2Klein9B):
    """FLUX.2-klein of 9 billion parameters with a key-value cache."""

    name = "flux2_klein_9b_kv"


FULL_SIZES: Mapping[str, FullSize] = {
    base.name: base
    for base in (
        FluxKontextBase(),
        QwenImageEditBase(),
        QwenImageEditPlusBase(),
        Flux2Klein4B(),
        Flux2Klein9B(),
        Flux2Klein4BKV(),
        Flux2Klein9BKV(),
    )
}

"""Training recipe of `shapes-kontext`, a FLUX-Kontext pipeline small enough to train on two CPU cores.

Every part is of the class that the real pipeline uses (`FluxTransformer2DModel`, `AutoencoderKL`, `T5EncoderModel`,
`CLIPTextModel`, their tokenizers, the scheduler), so the result has the same code paths and key names as FLUX.1-Kontext.
Three choices make the text side behave like the large model's:

- FLUX gives text rows no positions, so the T5 encoder must bind "red" to "circle". Its attention is limited to the next two
  tokens, so rows of one instruction contain no information about another instruction.
- Training uses the pooled CLIP vector of a different prompt. A pooled vector cannot be masked, so the instruction has to be
  encoded in the text rows, as SliderEdit assumes (paper, section on selective tokens).
- Prompt padding varies between steps, so any `max_sequence_length` from 17 to 31 works.

The autoencoder's latents are tied to known features: the low frequencies of each 4×4 patch, and the share of it that the
circle and the square cover. A diffusion model learns far faster on semantic latents (VA-VAE, arXiv 2501.01423). Telling a
circle from a square is easy for the encoder's convolutions, but a transformer of five blocks needs more steps for it than
this recipe has. The features are known exactly, so the editor trains on them independently of the autoencoder.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.shapes.world import (
    ALL_INSTRUCTIONS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Example,
    Scene,
    Shape,
    coverage,
    draw_example,
    draw_scene,
    held_out_examples,
    render,
)
from slideredit_rt.training.checkpoint import load_checkpoint, save_checkpoint

MAX_SEQUENCE_LENGTH = 24
_TEXT_WIDTH = 128
_POOLED_WIDTH = 32
_HEADS, _HEAD_WIDTH, _ROPE_AXES = 4, 32, (4, 14, 14)
_AXIS_STARTS = (0, 4, 18)
# Share of training prompts with 0, 1, 2 and 3 instructions. Half of the empty prompts become the neutral sentence.
_COUNT_WEIGHTS = (0.08, 0.42, 0.34, 0.16)

# Words of the shapes world. Some are split into two pieces, like most words of a real prompt.
_PIECES = (
    *("▁" + word for word in ("make", "the", "and", *SHAPES, *COLOURS, *BACKGROUNDS)),
    *("▁back", "ground", "▁large", "▁small", "r", "er", "▁keep", "▁image", "▁same"),
)

# Text that gives the tokenizers letters and word pieces beyond the few words of the shapes world.
_CORPUS = """
Turn the man's hair curly, then give him a beard and a warm smile. Make her look younger and remove the glasses.
Add freckles, change the eye colour to green, and put a small silver ring on the left hand.
Replace the sky with a dramatic sunset; keep the houses, the trees and the people exactly as they are.
Convert this photograph into a watercolour painting with soft edges, muted tones and visible brush strokes.
Zoom out until the whole mountain is visible, blur the background, and sharpen the face in the foreground.
"Surprised" expression (mouth open), raised eyebrows: 30% stronger than before! What about 2 or 3 of them?
Let the dog wear a red-and-white striped jumper while the cat sleeps quietly under the wooden kitchen table.
Increase brightness, lower contrast, add fog; quickly fix the exposure of every pixel just below the horizon.
""".strip()


def _corpus() -> list[str]:
    world = [f"{a.text} and {b.text}" for a in ALL_INSTRUCTIONS for b in ALL_INSTRUCTIONS if a.subject != b.subject]
    return [*world, FluxKontext.neutral_prompt, *(line for line in _CORPUS.splitlines() for _ in range(20))]


def build_t5_tokenizer() -> T5TokenizerFast:
    """Train a Unigram tokenizer that behaves like T5's: word-start marks, NFKC, `</s>` appended, no byte fallback."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(_corpus(), trainer)
    scored = [(token, round(score, 6)) for token, score in json.loads(trained.to_str())["model"]["vocab"]]
    # The trainer orders equal scores at random, but token ids must not depend on the run.
    pieces = {token: score for token, score in sorted(scored, key=lambda p: (-p[1], p[0])) if token not in special}
    pieces |= dict.fromkeys(_PIECES, -3.0)
    tokenizer = T5TokenizerFast(
        vocab=[(token, 0.0) for token in special] + list(pieces.items()), extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def build_clip_tokenizer() -> CLIPTokenizer:
    """Train a byte-level BPE tokenizer with CLIP's rules: lower case, `</w>` at word ends, 77 positions."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = set(model["vocab"]) - set(special)
    tokens |= {f"{token}</w>" for token in tokens if len(token) == 1}
    # Sorted, because the trainer's order differs between runs. Special tokens come last, as in CLIP's own vocabulary.
    ordered = sorted(tokens, key=lambda t: (len(t), t)) + special
    merges = sorted((tuple(m) for m in model["merges"]), key=lambda m: (len(m[0] + m[1]), m))
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(ordered)}, merges=merges, model_max_length=77)


def build_text_encoders(t5: T5TokenizerFast, clip: CLIPTokenizer) -> tuple[T5EncoderModel, CLIPTextModel]:
    """Build a one-layer T5 encoder that attends to the next two tokens, and a small random CLIP text model."""
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=_TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    attention = text_encoder_2.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight.data
    offsets = torch.tensor([0, 1, 2])
    visible = attention._relative_position_bucket(offsets, bidirectional=True, num_buckets=32)
    hidden = torch.ones(len(bias), dtype=torch.bool)
    hidden[visible] = False
    # The value is finite so that the weights can be cast to float16. The softmax still gives exactly 0.
    bias[hidden] = -1e4
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=_POOLED_WIDTH,
            intermediate_size=64,
            projection_dim=_POOLED_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    return text_encoder_2, text_encoder


def _open_up(transformer: FluxTransformer2DModel) -> None:
    """Initialise open residual branches and sharp attention, which a short run has no time to learn."""
    for name, module in transformer.named_modules():
        if re.search(r"norm_(added_)?[qk]$", name):
            with torch.no_grad():
                for start in _AXIS_STARTS:
                    module.weight[start : start + 2] = 2.0
        elif re.search(r"attn\.to_[qk]$", name):
            _look_at_own_position(module, is_query=name.endswith("q"))
        elif isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle):
            # The modulation consists of shift, scale and gate (twice in a dual-stream block). Open the gates.
            width = module.linear.in_features
            with torch.no_grad():
                for chunk in range(2, module.linear.out_features // width, 3):
                    module.linear.bias[chunk * width : (chunk + 1) * width] = 1.0


@torch.no_grad()
def _look_at_own_position(projection: torch.nn.Linear, *, is_query: bool) -> None:
    """Bias every other head towards the reference token at its own position, which is slow to learn.

    Each axis has its fastest rotation in its first pair of dimensions, where equal directions favour equal coordinates. The
    first axis is the image id: a query turned by one radian favours the reference (id 1) over the noise (id 0).
    """
    for head in range(0, _HEADS, 2):
        bias = projection.bias[head * _HEAD_WIDTH : (head + 1) * _HEAD_WIDTH]
        for axis, start in enumerate(_AXIS_STARTS):
            turn = 1.0 if is_query and axis == 0 else 0.0
            bias[start], bias[start + 1] = 6 * math.cos(turn), 6 * math.sin(turn)


def build_pipeline(seed: int = 0) -> FluxKontextPipeline:
    """Build the untrained pipeline (2.1M-parameter transformer: 2 dual-stream and 3 single-stream blocks of width 128)."""
    torch.manual_seed(seed)
    t5, clip = build_t5_tokenizer(), build_clip_tokenizer()
    text_encoder_2, text_encoder = build_text_encoders(t5, clip)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=_ROPE_AXES,
    )
    _open_up(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096
    )
    return FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer,
    ).to("cpu")


def _cosine_basis(size: int = 4) -> Tensor:
    """Return the orthonormal DCT-II, `[frequency, position]`."""
    k, n = torch.arange(size)[:, None], torch.arange(size)[None, :]
    basis: Tensor = torch.cos(math.pi * (n + 0.5) * k / size) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def _patch_filters() -> Tensor:
    """Return 14 filters, `[14, 3, 4, 4]`: six luminance frequencies, and four of each of two colour differences."""
    basis = _cosine_basis()
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    low = [(0, 0), (0, 1), (1, 0), (1, 1)]
    frequencies = [[*low, (0, 2), (2, 0)], low, low]
    filters = [
        # Flat colour varies far more than detail. The gains bring both closer to unit variance.
        (0.7 if u == v == 0 else 1.2) * colours[c][:, None, None] * torch.outer(basis[u], basis[v])
        for c, pairs in enumerate(frequencies)
        for u, v in pairs
    ]
    return torch.stack(filters)


def ideal_latents(images: Tensor, shapes: Tensor) -> Tensor:
    """Return the latents that the autoencoder learns.

    Args:
        images: Images, `[N, 3, H, W]` in [−1, 1].
        shapes: Their `coverage`, `[N, 2, H, W]`.

    Returns:
        `[N, 16, H/4, W/4]`: 14 low frequencies of each 4×4 patch, and the share of it that circle and square cover.
    """
    return torch.cat([F.conv2d(images, _patch_filters(), stride=4), 1.5 * F.avg_pool2d(shapes, 4)], dim=1)


def _learning_rate(step: int, steps: int, peak: float, warm_up: int = 100) -> float:
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _varied_scene(rng: random.Random) -> Scene:
    """Draw a scene with colours and greys outside the palettes, as they occur at intermediate strengths."""

    def recolour(shape: Shape) -> Shape:
        colour = (rng.random(), rng.random(), rng.random())
        return Shape(shape.x, shape.y, shape.radius * rng.uniform(0.5, 1.45), colour)

    scene = draw_scene(rng)
    return Scene(rng.uniform(0.02, 0.98), recolour(scene.circle), recolour(scene.square))


def _vae_batch(step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return images in [−1, 1] and their coverage."""
    rng = random.Random(f"vae/{step}")
    half = batch // 2
    varied = [_varied_scene(rng) for _ in range(half)]
    examples = [draw_example(rng, rng.choice((1, 2, 3))) for _ in range(batch - half)]
    # Blends look like intermediate strengths.
    blend = torch.tensor([rng.choice((0.0, 1.0, rng.random())) for _ in examples])[:, None, None, None]
    before, after = [e.scene for e in examples], [e.target for e in examples]
    images = torch.cat([render(varied), torch.lerp(render(before), render(after), blend)])
    shapes = torch.cat([coverage(varied), torch.lerp(coverage(before), coverage(after), blend)])
    return images * 2 - 1, shapes


class _Loop:
    """Training loop with a cosine schedule, gradient clipping, a checkpoint every 200 steps and a progress bar."""

    def __init__(self, name: str, modules: dict[str, torch.nn.Module], steps: int, peak: float, work: Path) -> None:
        self.name, self.modules, self.steps, self.peak = name, modules, steps, peak
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3)
        self.path = work / f"{name}.pt"
        self.start = 0
        state = load_checkpoint(self.path)
        if state is not None:
            for key, module in modules.items():
                module.load_state_dict(state[key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.start = state["step"]

    def __iter__(self) -> Iterator[int]:
        with tqdm(range(self.start, self.steps), self.name, initial=self.start, total=self.steps, mininterval=1) as self.bar:
            for step in self.bar:
                for group in self.optimizer.param_groups:
                    group["lr"] = _learning_rate(step, self.steps, self.peak)
                yield step
                if (step + 1) % 200 == 0 or step + 1 == self.steps:
                    state = {key: module.state_dict() for key, module in self.modules.items()}
                    save_checkpoint(self.path, state | {"optimizer": self.optimizer.state_dict(), "step": step + 1})

    def update(self, loss: Tensor, shown: Tensor) -> None:
        self.bar.set_postfix(error=f"{shown.item():.5f}", refresh=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train_vae(vae: AutoencoderKL, steps: int, work: Path, batch: int = 32) -> None:
    """Train the encoder to predict `ideal_latents` and the decoder to reconstruct the image."""
    vae.train()
    for step in (loop := _Loop("vae", {"vae": vae}, steps, 2e-3, work)):
        images, shapes = _vae_batch(step, batch)
        # bfloat16 halves the time of the convolutions on processors with matrix units.
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            mean = posterior.mean.float()
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
            # Latents predicted by the editor have errors of about this size.
            decoded = vae.decode(mean + 0.03 * noise).sample
        error = decoded.float() - images
        squared = error.square().mean()
        loop.update(error.abs().mean() + 4 * squared + 2 * F.mse_loss(mean, ideal_latents(images, shapes)), squared)
    vae.eval()


def polish_decoder(vae: AutoencoderKL, steps: int, work: Path, batch: int = 32) -> None:
    """Train the decoder further. Its blur limits how close a suppressed edit can come to its source."""
    vae.requires_grad_(False).eval()
    vae.decoder.requires_grad_(True).train()
    for step in (loop := _Loop("decoder", {"decoder": vae.decoder}, steps, 1.5e-3, work)):
        images, _ = _vae_batch(1_000_000 + step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(images).latent_dist.mean.float()
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = vae.decode(mean + 0.02 * noise).sample
        squared = (decoded.float() - images).square().mean()
        loop.update(squared, squared)
    vae.requires_grad_(False).eval()


def _editor_batch(step: int, batch: int) -> tuple[list[Example], list[str], int]:
    rng = random.Random(f"editor/{step}")
    counts = rng.choices(range(4), _COUNT_WEIGHTS, k=batch)
    examples = [draw_example(rng, count) for count in counts]
    prompts = [e.prompt or rng.choice(("", FluxKontext.neutral_prompt)) for e in examples]
    return examples, prompts, rng.randint(17, 31)


def train_editor(pipeline: FluxKontextPipeline, steps: int, work: Path, batch: int = 32) -> None:
    """Train by flow matching on exact pairs: predict `noise − target` from `[noisy target, source]` and the prompt."""
    transformer, t5 = pipeline.transformer, pipeline.text_encoder_2
    transformer.train()
    t5.train()
    side = SIZE // 8
    ids = pipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1
    img_ids = torch.cat([ids, reference_ids])
    for step in (loop := _Loop("editor", {"transformer": transformer, "t5": t5}, steps, 1.2e-3, work)):
        examples, prompts, length = _editor_batch(step, batch)
        g = torch.Generator().manual_seed(step)
        scenes = [e.scene for e in examples] + [e.target for e in examples]
        latents = ideal_latents(render(scenes) * 2 - 1, coverage(scenes))
        source, target = pipeline._pack_latents(latents, *latents.shape).chunk(2)
        # The encoder has errors of about this size.
        source = source + 0.03 * torch.randn(source.shape, generator=g)
        with torch.no_grad():
            pooled = pipeline._get_clip_prompt_embeds(prompts)[torch.randperm(batch, generator=g)]
        tokens = pipeline.tokenizer_2(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # Timesteps are shifted by 3, because an edit is decided at high noise levels.
        uniform = torch.rand(batch, generator=g)
        sigma = 3 * uniform / (1 + 2 * uniform)
        noise = torch.randn(target.shape, generator=g)
        noisy = torch.lerp(target, noise, sigma[:, None, None])
        velocity = transformer(
            hidden_states=torch.cat([noisy, source], dim=1),
            encoder_hidden_states=t5(tokens.input_ids).last_hidden_state,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=torch.full((batch,), FluxKontext.guidance_scale),
            img_ids=img_ids,
            txt_ids=torch.zeros(length, 3),
            return_dict=False,
        )[0][:, : target.shape[1]]
        error = F.mse_loss(velocity, noise - target)
        loop.update(error, error)
    transformer.eval()
    t5.eval()


def edit_examples(pipeline: FluxKontextPipeline, examples: list[Example], steps: int = 12, seed: int = 0) -> Tensor:
    """Edit the examples' scenes with diffusers' own pipeline, and return float32 `[N, 3, SIZE, SIZE]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        images.append(
            pipeline(
                image=render(e.scene for e in part),
                prompt=[e.prompt for e in part],
                num_inference_steps=steps,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                height=SIZE,
                width=SIZE,
                max_area=SIZE * SIZE,
                _auto_resize=False,
                output_type="pt",
                generator=torch.Generator().manual_seed(seed + start),
            ).images
        )
    return torch.cat(images)


def evaluate_editor(pipeline: FluxKontextPipeline, number: int = 256, counts: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """Return mean squared errors to the correct edit, of the editor and of the unedited source, in units of [0, 1] pixels."""
    report: dict[str, Any] = {"scenes": number}
    for count in counts:
        examples = held_out_examples(number, count)
        target, source = render(e.target for e in examples), render(e.scene for e in examples)
        edited = edit_examples(pipeline, examples)
        error, unedited = F.mse_loss(edited, target).item(), F.mse_loss(source, target).item()
        report[f"instructions={count}"] = {"mse": error, "mse_unedited": unedited, "ratio": error / unedited}
    return report


def train_shapes_editor(
    out: Path, vae_steps: int = 1600, decoder_steps: int = 800, editor_steps: int = 2800, number: int = 256
) -> dict[str, Any]:
    """Run the whole recipe and write the pipeline to the folder `out`. An interrupted run continues from `out`.work.

    Args:
        out: Output folder.
        vae_steps: Training steps of the autoencoder.
        decoder_steps: Further training steps of its decoder.
        editor_steps: Training steps of the transformer and the T5 encoder.
        number: Number of held-out scenes for the evaluation.

    Returns:
        The evaluation, which is also written to `evaluation.json` in the folder.
    """
    work = out.with_name(f"{out.name}.work")
    pipeline = build_pipeline()
    train_vae(pipeline.vae, vae_steps, work)
    polish_decoder(pipeline.vae, decoder_steps, work)
    pipeline.text_encoder.requires_grad_(False)
    train_editor(pipeline, editor_steps, work)
    report = evaluate_editor(pipeline, number)
    pipeline.save_pretrained(out)
    (out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return report

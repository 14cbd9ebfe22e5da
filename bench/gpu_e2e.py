"""Whole edits on a GPU, from a PIL image and a prompt to a PIL image, beside diffusers with PEFT (`make gpu-e2e`).

The pipeline has the sizes of FLUX.1-Kontext and random bfloat16 weights, text encoders and autoencoder included: speed and
memory do not depend on their values. Tokenizers and scheduler are the embedded editor's. `--rehearse` runs the same code on
small modules, on a CPU too; its times are meaningless.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from PIL import Image

try:
    import transformers
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, FluxKontextPipeline

    from slideredit_rt.adapters import Adapter
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.bench import gpu_model
    from slideredit_rt.bench.gpu_model import compiled_graphs, engine_for, materialise, peft_adapter, random_adapter
    from slideredit_rt.bench.results import Mark, save_run, verdicts
    from slideredit_rt.editor import Prepared, SliderEditor
    from slideredit_rt.engines import inductor
    from slideredit_rt.engines.inductor import RECOMPILE_LIMIT
    from slideredit_rt.errors import SliderEditError
    from slideredit_rt.families import KINDS, Kind, get_family
    from slideredit_rt.modules import SliderBackbone
    from slideredit_rt.sliders import Controls, Slider, compose_prompt
    from slideredit_rt.strength import StrengthCurve
except ModuleNotFoundError as missing:
    sys.exit(f"gpu_e2e: this Python lacks {missing.name}; install slideredit-rt's dependencies into GPU_PYTHON")

INSTRUCTIONS = ("make the circle red", "make the square blue", "make the background dark")
GUIDANCE = 3.5
SWEEP = tuple(0.25 * i for i in range(7))
COLUMNS = {
    "frozen": "our engine without an adapter: the limit",
    "ours ST, 1 slider": "one instruction",
    "ours ST, 3 sliders": "three instructions",
    "ours GST": "every row",
    "diffusers + PEFT": "FluxKontextPipeline in eager mode, GST; a moved slider keeps its prompt embeddings",
    "diffusers + PEFT, compiled": "the same with compiled blocks",
    "published ST": "FluxKontextPipeline in eager mode with the authors' module",
}


@dataclass(frozen=True)
class Size:
    """Text rows, edge of the image in pixels, denoising steps, and repetitions of each row of the table."""

    text_rows: int
    side: int
    steps: int
    repeats: int


@dataclass
class Column:
    """One way to edit.

    Attributes:
        first_seconds: An edit whose image and prompt are new; nothing is left to compile.
        moved_seconds: Another strength on the same image and prompt.
        sweep_seconds: Seven strengths on the same image and prompt.
        compile_seconds: Compilation, which only the very first edit includes.
        encode_seconds, decode_seconds: Encoding and decoding of one edit; None for pipelines that do not separate them.
        step_seconds: One call of the backbone; None for pipelines that do not separate it.
        outside_share: Share of a moved slider's edit that is not spent in its steps.
        synchronisations: Waits of the host in the denoising loop; None on a CPU.
        recompilations: Graphs captured by dynamo after the first edit.
        peak_gib: Device memory that tensors held, weights included; None on a CPU.
    """

    name: str
    first_seconds: float
    moved_seconds: float
    sweep_seconds: float
    compile_seconds: float
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    step_seconds: float | None = None
    outside_share: float | None = None
    synchronisations: int | None = None
    recompilations: int = 0
    peak_gib: float | None = None
    notes: list[str] = field(default_factory=list)


def random_pipeline(size: Size, *, small: bool, device: torch.device) -> Any:
    """Return a FLUX.1-Kontext pipeline of random weights on the device."""
    embedded = get_family("flux_kontext").load_pipeline(resolve_base("shapes-kontext"), transformer=False)
    embedded.tokenizer_2.model_max_length = size.text_rows
    t5 = {"d_model": 64, "num_layers": 1} if small else {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    clip = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    wide_clip = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    widths = (32, 32, 32, 32) if small else (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with init_empty_weights():
        text = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **t5))
        pooled = transformers.CLIPTextModel(transformers.CLIPTextConfig(**(clip if small else wide_clip)))
        vae = AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=1 if small else 2,
            latent_channels=16,
            sample_size=size.side,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            **blocks,
        )
    return FluxKontextPipeline(
        scheduler=embedded.scheduler,
        vae=materialise(vae, device),
        text_encoder=materialise(pooled, device),
        tokenizer=embedded.tokenizer,
        text_encoder_2=materialise(text, device),
        tokenizer_2=embedded.tokenizer_2,
        transformer=gpu_model.random_transformer("flux_kontext", small=small, device=device),
    )


class Bench:
    """Runs the columns on one pipeline.

    Args:
        pipeline: Pipeline of `random_pipeline`.
        size: Sizes of the edits.
    """

    def __init__(self, pipeline: Any, size: Size) -> None:
        self.pipeline, self.size = pipeline, size
        self.family = get_family("flux_kontext")
        self.family.place(pipeline, pipeline.transformer.device)
        self.device: torch.device = pipeline.transformer.device
        self.cuda = self.device.type == "cuda"
        self.image = Image.effect_noise((size.side, size.side), 60).convert("RGB")
        self.adapters = {kind: random_adapter(self.family, pipeline.transformer, kind) for kind in KINDS}
        self.columns: list[Column] = []

    def seconds(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Return the median seconds of a call, the device idle before and after."""
        times = []
        for _ in range(self.size.repeats if repeats is None else repeats):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def measure(self, name: str, first: Callable[[], object], moved: Callable[[float], object], **extra: Any) -> Column:
        """Time the rows of the table that every column has.

        Args:
            name: Name of the column.
            first: Edits with nothing encoded.
            moved: Edits at another strength.
            extra: Other fields of the column.
        """
        torch._dynamo.utils.counters.clear()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        cold = self.seconds(first, repeats=1)
        before = compiled_graphs()
        warm = self.seconds(first)
        strengths = iter(range(1, 1000))
        step = self.seconds(lambda: moved(next(strengths) / 100))
        sweep = self.seconds(lambda: [moved(s) for s in SWEEP], repeats=1)
        column = Column(name, warm, step, sweep, max(0.0, cold - warm), recompilations=compiled_graphs() - before, **extra)
        if self.cuda:
            column.peak_gib = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.columns.append(column)
        sys.stderr.write(f"{name}: first edit {warm:.3f} s, moved slider {step:.3f} s, compilation {cold - warm:.1f} s\n")
        return column

    @contextmanager
    def editor(self, kind: Kind | None) -> Iterator[SliderEditor]:
        """Make an editor on the pipeline as it is; for the frozen backbone, one whose sliders do nothing."""
        torch._dynamo.reset()
        adapter: Adapter | None = self.adapters[kind] if kind else None
        backbone = SliderBackbone(self.family, self.pipeline.transformer, adapter)
        config = dict(self.pipeline.transformer.config)
        controls = Controls(kind or "st", StrengthCurve(), {})
        engine = engine_for(backbone.requires_grad_(False))
        limits = {"max_batch": gpu_model.BATCH, "max_sliders": gpu_model.MAX_SLIDERS}
        try:
            yield SliderEditor(self.family, self.pipeline, engine, config, controls, **limits)
        finally:
            engine.close()
            backbone.remove()

    def ours(self, name: str, kind: Kind | None, instructions: tuple[str, ...]) -> None:
        """Measure one of our columns, and what an edit consists of."""
        sliders, steps = [Slider(text) for text in instructions], self.size.steps
        with self.editor(kind) as editor:
            prepare = partial(editor.prepare, self.image, sliders, steps=steps, guidance_scale=GUIDANCE)
            prepared: Prepared = prepare()

            def edit(strength: float, again: Prepared | None = None) -> object:
                return editor.render(again or prepare(), [[strength] * len(sliders)])

            column = self.measure(name, lambda: edit(0.5), lambda s: edit(s, prepared))
            if name.startswith("ours"):
                together = partial(editor.render, prepared, [[s] * len(sliders) for s in SWEEP])
                together()  # compiles for larger batches
                column.notes.append(f"7 strengths in batches of {editor.max_batch}: {self.seconds(together, repeats=1):.3f} s")
            inputs = editor.backbone_inputs(prepared, editor.alphas(prepared, [[0.5] * len(sliders)]))
            latents, size = prepared.conditioning.latents, (prepared.conditioning.height, prepared.conditioning.width)
            column.encode_seconds = self.seconds(prepare)
            column.decode_seconds = self.seconds(lambda: editor.decode(latents, *size))
            column.step_seconds = self.seconds(lambda: editor.engine(inputs), repeats=max(self.size.repeats, 5))
            column.outside_share = 1 - steps * column.step_seconds / column.moved_seconds
            column.synchronisations = self.synchronisations(editor, prepared, inputs)

    def synchronisations(self, editor: SliderEditor, prepared: Prepared, inputs: dict[str, torch.Tensor]) -> int | None:
        """Count the host's waits from the first step to the latents of the last one."""
        if not self.cuda:
            return None
        steps, decode = self.size.steps, editor.decode
        editor.__dict__["decode"] = lambda latents, height, width: latents
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                editor._denoise(prepared.conditioning, inputs, steps, 1.0, None, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            editor.__dict__["decode"] = decode
        # The schedule is uploaded once, ahead of the first step.
        waits = [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]
        return max(0, len(waits) - 2)

    def diffusers(self, name: str, set_strength: Callable[[float], None], *, compile_blocks: bool = False) -> None:
        """Measure diffusers' own pipeline with something in its transformer that scales an edit."""
        torch._dynamo.reset()
        self._run_blocks_eagerly()
        if compile_blocks:
            self.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=inductor.COMPILER)
        prompt, side = compose_prompt(INSTRUCTIONS), self.size.side
        embeds, pooled, _ = self.pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=self.size.text_rows)
        rest = {
            "image": self.image,
            "num_inference_steps": self.size.steps,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": self.size.text_rows,
            "max_area": side * side,
            "height": side,
            "width": side,
            "_auto_resize": False,
        }

        def moved(strength: float) -> object:
            set_strength(strength)
            return self.pipeline(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **rest)

        # PEFT's strength is a constant of the compiled code, so every new one compiles again.
        limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
        with torch._dynamo.config.patch(limits):  # type: ignore[attr-defined]
            self.measure(name, lambda: self.pipeline(prompt=prompt, **rest), moved)
        self._run_blocks_eagerly()

    def _run_blocks_eagerly(self) -> None:
        for module in self.pipeline.transformer.modules():
            module._compiled_call_impl = None

    def run(self) -> None:
        """Measure every column."""
        self.pipeline.set_progress_bar_config(disable=True)
        self.ours("frozen", None, INSTRUCTIONS[:1])
        self.ours("ours ST, 1 slider", "st", INSTRUCTIONS[:1])
        self.ours("ours ST, 3 sliders", "st", INSTRUCTIONS)
        self.ours("ours GST", "gst", INSTRUCTIONS[:1])
        transformer = self.pipeline.transformer
        with peft_adapter(transformer, self.adapters["gst"]) as set_strength:
            self.diffusers("diffusers + PEFT", set_strength)
            self.diffusers("diffusers + PEFT, compiled", set_strength, compile_blocks=True)
        rows = gpu_model.Size(self.size.text_rows, 0, (8, 16, 32) if self.size.text_rows > 64 else (2, 3, 4), 1)
        with gpu_model.published(transformer, self.adapters["st"], rows) as set_strength:
            self.diffusers("published ST", set_strength)


def marks(bench: Bench) -> list[Mark]:
    """Return what the run is judged by."""
    of = {column.name: column for column in bench.columns}
    frozen, st, gst = of["frozen"], of["ours ST, 3 sliders"], of["ours GST"]
    found = [
        Mark("first edit, diffusers + PEFT / ours GST", of["diffusers + PEFT"].first_seconds / gst.first_seconds, ">=", 2.2),
        Mark("moved slider, share outside the steps", max(c.outside_share or 0 for c in (st, gst)), "<=", 0.03),
        Mark("GST step / frozen", (gst.step_seconds or 0) / (frozen.step_seconds or 1), "<=", 1.02),
        Mark("ST step / frozen", (st.step_seconds or 0) / (frozen.step_seconds or 1), "<=", 1.005),
        Mark("recompilations after the first edit", max(c.recompilations for c in (st, gst)), "<=", 0, counted=True),
    ]
    if bench.cuda:
        waits = max(c.synchronisations or 0 for c in (frozen, st, gst))
        found.append(Mark("host synchronisations in the loop", waits, "<=", 0, counted=True))
    return found


def table(bench: Bench) -> str:
    """Return the columns in Markdown."""
    fields = {
        "first edit s": "first_seconds",
        "moved slider s": "moved_seconds",
        "7 strengths s": "sweep_seconds",
        "encode s": "encode_seconds",
        "step ms": "step_seconds",
        "decode s": "decode_seconds",
        "outside steps": "outside_share",
        "waits": "synchronisations",
        "recompiled": "recompilations",
        "peak GiB": "peak_gib",
        "compilation s": "compile_seconds",
    }
    lines = ["| | " + " | ".join(fields) + " | |", "|" + "---|" * (len(fields) + 2)]
    for column in bench.columns:
        values = [getattr(column, name) for name in fields.values()]
        scaled = [v * 1e3 if name == "step ms" and v is not None else v for name, v in zip(fields, values, strict=True)]
        cells = ["–" if v is None else str(v) if isinstance(v, int) else f"{v:.3f}" for v in scaled]
        about = "; ".join([COLUMNS[column.name], *column.notes])
        lines.append(f"| {column.name} | " + " | ".join(cells) + f" | {about} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the bench; 0 also where a mark is missed, which the table says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results folder (default: bench/results; none for a rehearsal)")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps of an edit (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="edits per figure (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="small modules on any machine; the times are meaningless")
    args = parser.parse_args()
    rehearse: bool = args.rehearse
    cuda = torch.cuda.is_available()
    if not cuda and not rehearse:
        sys.stderr.write("gpu_e2e: no CUDA device found; pass --rehearse to run small modules on the CPU\n")
        return 2
    size = Size(512, 1024, args.steps, args.repeats)
    if rehearse:
        inductor.COMPILER, size = "eager", Size(16, 64, 2, 1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    started = time.perf_counter()
    try:
        bench = Bench(random_pipeline(size, small=rehearse, device=device), size)
        bench.run()
    except torch.OutOfMemoryError:
        sys.stderr.write("gpu_e2e: this GPU's memory is too small; FLUX.1-Kontext needs 48 GB\n")
        return 2
    except SliderEditError as error:
        sys.stderr.write(f"gpu_e2e: {error}\n")
        return 2
    about = {
        **asdict(size),
        "family": "flux_kontext",
        "rehearsal": rehearse,
        "seconds": round(time.perf_counter() - started, 1),
    }
    content = {"columns": [asdict(column) for column in bench.columns]}
    found = verdicts(marks(bench), timed=not rehearse)
    out = args.out if rehearse else args.out or Path("bench/results")
    command = f"make gpu-e2e BENCH_OPTIONS='--steps {size.steps} --repeats {size.repeats}'"
    sys.stdout.write(save_run("e2e_flux_kontext", command, device, about, content, table(bench), found, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The drop-in pipeline: the published calls and results, and better ones where the published algorithm is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, load_adapter, save_adapter
from slideredit_rt.assets import resolve_adapter, resolve_base
from slideredit_rt.compat import SliderEditFluxKontextPipeline
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.modules import MaskedLoRALinear
from slideredit_rt.shapes.world import held_out_examples, scene_image
from slideredit_rt.sliders import Slider

RED, DARK = "make the circle red", "make the background dark"
PROMPT = f"{RED} and {DARK}"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A model this small takes longer on several threads, much longer beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pipeline() -> FluxKontextPipeline:
    """diffusers' own, as it loads it: ours keeps the autoencoder in another memory format, which rounds differently."""
    loaded = FluxKontextPipeline.from_pretrained(resolve_base("shapes-kontext"), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def pipe() -> SliderEditFluxKontextPipeline:
    loaded: SliderEditFluxKontextPipeline = SliderEditFluxKontextPipeline.from_pretrained(
        resolve_base("shapes-kontext"), local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def edit(pipe: Any, image: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    """One call at the size of the embedded base; returns what is in `.images`."""
    defaults = {"num_inference_steps": 2, "max_area": 64 * 64, "_auto_resize": False, "max_sequence_length": 24}
    generator = torch.Generator().manual_seed(0)
    return pipe(**{"image": image, "prompt": prompt, "generator": generator, "output_type": "pt"} | defaults | options).images


class Published(nn.Module):
    """One text linear as the released code computes it: base output plus mask · scale · B(A x)."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, mask: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.mask, self.scale = base, lora_a, lora_b, mask, scale

    def forward(self, x: Tensor) -> Tensor:
        update = (x @ self.lora_a.T) @ self.lora_b.T
        y: Tensor = self.base(x) + self.mask[..., None] * self.scale[..., None] * update
        return y


def published_edit(
    pipe: Any, adapter: Adapter, image: Image.Image, subprompts: Sequence[str], alphas: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The published ST algorithm: token ids of each sub-prompt found in the prompt's, first match, scales in `dtype`."""
    tokenizer, length = pipe.tokenizer_2, pipe.tokenizer_2.model_max_length
    ids = tokenizer(PROMPT).input_ids
    mask, scale = torch.zeros(1, length), torch.ones(1, length, dtype=dtype)
    for text, alpha in zip(subprompts, alphas, strict=True):
        wanted = tokenizer(text).input_ids[:-1]
        first = next(i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
        mask[0, first : first + len(wanted)] = 1
        scale[0, first : first + len(wanted)] *= alpha
    for name, (a, b) in adapter.pairs.items():
        parent, _, child = name.rpartition(".")
        module = pipe.transformer.get_submodule(name)
        setattr(pipe.transformer.get_submodule(parent), child, Published(module, a, b, mask, scale.float()))
    images: Tensor = edit(pipe, image)
    return images


@pytest.mark.parametrize("alphas", [[1.0, 0.0], [0.5, -0.25], [-1.0, 0.75]])
def test_st_is_the_published_algorithm(
    pipe: Any, pipeline: Any, family: Family, scene: Image.Image, tmp_path: Path, alphas: list[float]
) -> None:
    adapter = load_adapter("shapes-st", family)
    save_adapter(adapter, tmp_path / "stlora.pt", "slideredit-st")
    pipe.load_stlora(str(tmp_path / "stlora.pt"), 16, 0.0)
    ours = edit(pipe, scene, subprompts_list=[RED, DARK], slider_alpha_list=alphas)
    published = published_edit(pipeline, adapter, scene, [RED, DARK], alphas, torch.bfloat16)
    assert (ours - published).abs().max() <= 1e-5


def test_alphas_are_not_rounded_to_bfloat16(pipe: Any, family: Family, scene: Image.Image) -> None:
    adapter = load_adapter("shapes-st", family)
    pipe.load_stlora("shapes-st")
    ours = edit(pipe, scene, subprompts_list=[RED], slider_alpha_list=[0.301])
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        plain = family.load_pipeline(resolve_base("shapes-kontext"))
        errors.append((ours - published_edit(plain, adapter, scene, [RED], [0.301], dtype)).abs().max())
    assert errors[0] <= 1e-5 < errors[1]


def test_gst_is_peft_at_that_weight(pipe: Any, pipeline: Any, scene: Image.Image) -> None:
    file = resolve_adapter("shapes-gst")
    pipe.load_gstlora(file)
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="gstlora")
    for alpha in (0.0, 1.0, 0.6, -0.7):
        pipeline.set_adapters(["gstlora"], [alpha])
        assert (edit(pipe, scene, slider_alpha=alpha) - edit(pipeline, scene)).abs().max() <= 1e-5


def test_a_folder_as_the_authors_trainer_leaves_it(pipe: Any, scene: Image.Image, tmp_path: Path) -> None:
    shutil.copyfile(resolve_adapter("shapes-gst"), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_gstlora(str(tmp_path))
    first = edit(pipe, scene, slider_alpha=0.5)
    pipe.load_gstlora("shapes-gst")
    assert torch.equal(first, edit(pipe, scene, slider_alpha=0.5))


def test_st_and_gst_are_the_editor_at_the_same_seed(pipe: Any, scene: Image.Image, kind: str) -> None:
    editor = SliderEditor.from_pretrained("shapes-kontext", f"shapes-{kind}")
    sliders = [Slider(RED, 0.25), Slider(DARK, 1.5)] if kind == "st" else [Slider(RED, 0.25)]
    prepared = editor.prepare(scene, sliders, prompt=PROMPT, seed=0)
    expected = editor.render_tensor(prepared, [[s.strength for s in sliders]], steps=2)
    if kind == "st":
        pipe.load_stlora("shapes-st")
        ours = edit(pipe, scene, subprompts_list=[RED, DARK], slider_alpha_list=[0.75, -0.5])
    else:
        pipe.load_gstlora("shapes-gst")
        ours = edit(pipe, scene, slider_alpha=0.75)
    assert (ours - expected).abs().max() <= 1e-5


def test_alpha_zero_and_unloading_give_the_base_bit_for_bit(pipe: Any, pipeline: Any, scene: Image.Image) -> None:
    base = edit(pipeline, scene)
    names = set(pipe.transformer.state_dict())
    assert torch.equal(edit(pipe, scene), base)
    pipe.unload_slideredit_lora()
    pipe.load_stlora("shapes-st")
    assert torch.equal(edit(pipe, scene, subprompts_list=[RED, DARK], slider_alpha_list=[0, 0.0]), base)
    assert torch.equal(edit(pipe, scene, subprompts_list=[], slider_alpha_list=[]), base)
    assert not torch.equal(edit(pipe, scene, subprompts_list=[RED], slider_alpha_list=[1]), base)
    pipe.load_gstlora("shapes-gst")
    assert torch.equal(edit(pipe, scene, slider_alpha=0), base)
    assert not torch.equal(edit(pipe, scene, slider_alpha=np.float64(1)), base)
    pipe.unload_slideredit_lora()
    assert torch.equal(edit(pipe, scene), base)
    assert set(pipe.transformer.state_dict()) == names
    assert not any(isinstance(m, MaskedLoRALinear) for m in pipe.transformer.modules())
    assert not pipe.transformer._forward_pre_hooks


def test_repeated_subprompts_are_one_occurrence_each(pipe: Any, scene: Image.Image) -> None:
    pipe.load_stlora("shapes-st")
    prompt = f"{RED} and {DARK} and {RED}"

    def at(*alphas: float) -> Any:
        return edit(pipe, scene, prompt, subprompts_list=[RED, RED], slider_alpha_list=list(alphas))

    first, second = at(1, 0), at(0, 1)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(first, edit(pipe, scene, prompt, subprompts_list=[RED], slider_alpha_list=[1]))


def test_every_row_of_a_batch_is_what_it_is_alone(pipe: Any, scene: Image.Image, kind: str) -> None:
    other = scene_image(held_out_examples(2, 2)[1])
    prompts = [PROMPT, f"{DARK} and {RED}"]
    noise = torch.randn(2, 64, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(5))
    if kind == "st":
        pipe.load_stlora("shapes-st")
        both: dict[str, Any] = {"subprompts_list": [[RED, DARK], [DARK]], "slider_alpha_list": [[0.5, 0.25], [1.0]]}
        single = [{k: v[i] for k, v in both.items()} for i in range(2)]
    else:
        pipe.load_gstlora("shapes-gst")
        both = {"slider_alpha": [0.5, -0.5]}
        single = [{"slider_alpha": 0.5}, {"slider_alpha": -0.5}]
    batch = edit(pipe, [scene, other], prompts, latents=noise, **both)
    for i, image in enumerate([scene, other]):
        alone = edit(pipe, image, prompts[i], latents=noise[i : i + 1], **single[i])
        assert (batch[i : i + 1] - alone).abs().max() <= 1e-5


def test_flat_lists_are_for_every_prompt_and_image_of_a_prompt(pipe: Any, scene: Image.Image) -> None:
    pipe.load_stlora("shapes-st")
    sliders = {"subprompts_list": [RED], "slider_alpha_list": [0.5]}
    flat = edit(pipe, scene, [PROMPT, PROMPT], num_images_per_prompt=2, **sliders)
    nested = edit(
        pipe,
        scene,
        [PROMPT, PROMPT],
        num_images_per_prompt=2,
        **{name: [value, value] for name, value in sliders.items()},
    )
    assert flat.shape == (4, 3, 64, 64)
    assert torch.equal(flat, nested)


@pytest.mark.parametrize("rows", [16, 24, 40])
def test_any_sequence_length(pipe: Any, scene: Image.Image, rows: int) -> None:
    pipe.load_stlora("shapes-st")
    base = edit(pipe, scene, RED, subprompts_list=[RED], slider_alpha_list=[0], max_sequence_length=rows)
    assert not torch.equal(base, edit(pipe, scene, RED, subprompts_list=[RED], slider_alpha_list=[1], max_sequence_length=rows))
    with pytest.raises(SliderEditError, match="is cut off at the end of the prompt"):
        edit(pipe, scene, PROMPT, subprompts_list=[DARK], slider_alpha_list=[1], max_sequence_length=8)


def test_the_negative_pass_of_true_cfg_is_the_frozen_model(pipe: Any, scene: Image.Image, kind: str) -> None:
    """With scale w the step is n + w (p − n): whatever the adapter does to n would show."""
    getattr(pipe, f"load_{kind}lora")(f"shapes-{kind}")
    sliders = {"subprompts_list": [RED], "slider_alpha_list": [1.0]} if kind == "st" else {"slider_alpha": 1.0}
    one_step = {"num_inference_steps": 1, "output_type": "latent"}
    guided = edit(pipe, scene, negative_prompt=DARK, true_cfg_scale=3.0, **one_step, **sliders)
    positive = edit(pipe, scene, **one_step, **sliders)
    pipe.unload_slideredit_lora()
    negative = edit(pipe, scene, DARK, **one_step)
    assert (guided - (negative + 3 * (positive - negative))).abs().max() <= 1e-4


def test_prompt_2_is_what_subprompts_are_found_in(pipe: Any, scene: Image.Image) -> None:
    pipe.load_stlora("shapes-st")
    edit(pipe, scene, "change it", prompt_2=PROMPT, subprompts_list=[RED], slider_alpha_list=[1])
    with pytest.raises(SliderEditError, match="nowhere in the prompt"):
        edit(pipe, scene, PROMPT, prompt_2="change it", subprompts_list=[RED], slider_alpha_list=[1])


def test_it_returns_what_diffusers_returns(pipe: Any, scene: Image.Image) -> None:
    pipe.load_gstlora("shapes-gst")
    small = {"num_inference_steps": 1, "max_area": 64 * 64, "_auto_resize": False, "max_sequence_length": 24}
    sizes = {"height": 64, "width": 64, "guidance_scale": 2.5}
    output = pipe(image=scene, prompt=PROMPT, slider_alpha=0.5, **small, **sizes)
    assert isinstance(output, FluxPipelineOutput)
    assert isinstance(output.images[0], Image.Image)
    assert output.images[0].size == (64, 64)
    in_tuple = pipe(scene, PROMPT, slider_alpha=0.5, output_type="np", return_dict=False, **small)
    assert isinstance(in_tuple, tuple)
    assert in_tuple[0].shape == (1, 64, 64, 3)
    seen: list[int] = []

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    latent = pipe(
        image=scene, prompt=PROMPT, slider_alpha=0.5, output_type="latent", callback_on_step_end=callback, **small
    ).images
    assert latent.shape == (1, 64, pipe.transformer.config.in_channels)
    assert seen == [0]
    assert isinstance(pipe, FluxKontextPipeline)


def test_embeddings_instead_of_a_prompt(pipe: Any, scene: Image.Image) -> None:
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(PROMPT, max_sequence_length=24)
    pipe.load_gstlora("shapes-gst")
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    assert torch.equal(edit(pipe, scene, None, slider_alpha=0.5, **given), edit(pipe, scene, slider_alpha=0.5))
    pipe.load_stlora("shapes-st")
    with pytest.raises(SliderEditError, match="looked up in the prompt"):
        edit(pipe, scene, None, subprompts_list=[RED], slider_alpha_list=[1], **given)


def test_a_bfloat16_pipeline(scene: Image.Image) -> None:
    pipe = SliderEditFluxKontextPipeline.from_pretrained(resolve_base("shapes-kontext"), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    base = edit(pipe, scene)
    pipe.load_stlora("shapes-st")
    assert pipe.transformer.transformer_blocks[0].attn.add_q_proj.lora_A.dtype == torch.float32
    assert torch.equal(edit(pipe, scene, subprompts_list=[RED], slider_alpha_list=[0]), base)
    assert not torch.equal(edit(pipe, scene, subprompts_list=[RED], slider_alpha_list=[1]), base)


@pytest.mark.parametrize(
    ("loaded", "arguments", "message"),
    [
        (None, {"slider_alpha": 0.5}, "no adapter is loaded"),
        (None, {"subprompts_list": [RED], "slider_alpha_list": [1]}, "no adapter is loaded"),
        ("gst", {}, "pass slider_alpha"),
        ("gst", {"subprompts_list": [RED], "slider_alpha_list": [1]}, "pass slider_alpha"),
        ("gst", {"slider_alpha": 1, "slider_alpha_list": [1]}, "no sub-prompts"),
        ("gst", {"slider_alpha": [1, 2]}, "2 alphas for 1 prompts"),
        ("gst", {"slider_alpha": float("nan")}, "not all finite"),
        ("gst", {"slider_alpha": "strong"}, "not numbers"),
        ("st", {}, "pass subprompts_list and slider_alpha_list"),
        ("st", {"slider_alpha": 1}, "no slider_alpha"),
        ("st", {"subprompts_list": [RED]}, "pass subprompts_list and slider_alpha_list"),
        ("st", {"subprompts_list": [RED], "slider_alpha_list": [1], "slider_alpha": 1}, "no slider_alpha"),
        ("st", {"subprompts_list": [RED, DARK], "slider_alpha_list": [1]}, "2 sub-prompts and 1 alphas"),
        ("st", {"subprompts_list": ["make the circle pink"], "slider_alpha_list": [1]}, "nowhere in the prompt"),
        ("st", {"subprompts_list": [RED, "the circle"], "slider_alpha_list": [1, 1]}, "overlap on token"),
        ("st", {"subprompts_list": [[RED], [RED]], "slider_alpha_list": [1]}, "2 entries for 1 prompts"),
        ("st", {"subprompts_list": [[RED], RED], "slider_alpha_list": [1]}, "one flat list for all"),
    ],
)
def test_arguments_that_do_not_belong_together(
    pipe: Any, scene: Image.Image, loaded: str | None, arguments: dict[str, Any], message: str
) -> None:
    if loaded:
        getattr(pipe, f"load_{loaded}lora")(f"shapes-{loaded}")
    with pytest.raises(SliderEditError, match=message):
        edit(pipe, scene, **arguments)


def test_adapters_that_do_not_belong_leave_the_loaded_one(
    pipe: Any, family: Family, scene: Image.Image, tmp_path: Path
) -> None:
    pipe.load_stlora("shapes-st", 16)
    sliders = {"subprompts_list": [RED], "slider_alpha_list": [0.5]}
    before = edit(pipe, scene, **sliders)
    a, b = torch.zeros(2, 64), torch.zeros(64, 2)
    for name, block in (("small", 0), ("deep", 7)):
        pairs = {f"transformer_blocks.{block}.attn.add_q_proj": (a, b)}
        save_adapter(Adapter(family.name, "st", 2, pairs, "x"), tmp_path / f"{name}.safetensors")
    for call, message in (
        (lambda: pipe.load_gstlora("shapes-st"), "load it with load_stlora"),
        (lambda: pipe.load_stlora("shapes-gst"), "load it with load_gstlora"),
        (lambda: pipe.load_stlora("shapes-st", 8, 0.0), "has rank 16, not 8"),
        (lambda: pipe.load_stlora("shapes-st", 16, 2.0), "expected a probability"),
        (lambda: pipe.load_stlora(tmp_path / "nothing.pt"), "does not exist"),
        (lambda: pipe.load_stlora(tmp_path / "small.safetensors"), "has a 64×64 update"),
        (lambda: pipe.load_stlora(tmp_path / "deep.safetensors"), "not found: transformer_blocks.7"),
    ):
        with pytest.raises(SliderEditError, match=message):
            call()
    assert torch.equal(edit(pipe, scene, **sliders), before)


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_an_image_that_is_not_finite_is_an_error(pipe: Any, scene: Image.Image, output_type: str) -> None:
    pipe.load_stlora("shapes-st")
    options = {"subprompts_list": [RED], "output_type": output_type}
    with pytest.raises(SliderEditError, match=r"with the alphas \[-1e\+20\] produced NaN or infinity; use"):
        edit(pipe, scene, slider_alpha_list=[-1e20], **options)
    edit(pipe, scene, slider_alpha_list=[-0.5], **options)


def test_an_autoencoder_that_overflows_is_noticed(pipe: Any, scene: Image.Image) -> None:
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(SliderEditError, match="edit without sliders produced NaN or infinity"):
        edit(pipe, scene)


def test_images_of_any_mode_and_paths(pipe: Any, scene: Image.Image, tmp_path: Path) -> None:
    scene.save(tmp_path / "scene.png")
    expected = edit(pipe, scene)
    for source in (scene.convert("RGBA"), tmp_path / "scene.png", str(tmp_path / "scene.png"), [scene.convert("RGBA")]):
        assert torch.equal(edit(pipe, source), expected)
    grey = scene.convert("L")
    assert torch.equal(edit(pipe, grey), edit(pipe, grey.convert("RGB")))
    # What diffusers takes beside them is as good as before.
    assert (edit(pipe, torch.from_numpy(np.asarray(scene)).permute(2, 0, 1)[None] / 255) - expected).abs().max() <= 1e-5

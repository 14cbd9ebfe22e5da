"""FLUX.2-klein with a key-value cache: the same images as diffusers' own pipeline, while the source images are read once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flux2_checkpoint import SIDE, TEXT_ROWS, diffusers_edit, flux2_adapter, save_tiny_checkpoint
from http_server import as_file, image_of, serving
from PIL import Image
from qwen_checkpoint import random_image
from toy_backend import Toy

from slideredit_rt import cli
from slideredit_rt.adapters import load_adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BACKENDS, BuildSettings, get_backend, read_manifest
from slideredit_rt.engines.inductor import InductorEngine
from slideredit_rt.engines.request import check_request, reading_request
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.inference_server import export_triton
from slideredit_rt.families import KINDS, Family, Kind, Reader, family_of, get_family
from slideredit_rt.memory import ServerParts, engine_footprint, plan_memory
from slideredit_rt.serving.batch import Batch, make_rows
from slideredit_rt.serving.cache import EncodingCache
from slideredit_rt.serving.run import cache_size
from slideredit_rt.serving.settings import ServeSettings
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer
from slideredit_rt.verify import compare_backbones, verify_engine

PARTS = ("make the circle red", "make the background dark")
PROMPT = compose_prompt(PARTS)


@pytest.fixture(scope="module")
def family() -> Family:
    return get_family("flux2_kv")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("kv") / "base", kv=True)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[Kind, Path]:
    paths: dict[Kind, Path] = {kind: base.parent / f"{kind}.safetensors" for kind in KINDS}
    for kind, path in paths.items():
        save_adapter(flux2_adapter(base, kind, family_name="flux2_kv", all_projections=True), path)
    return paths


@pytest.fixture(scope="module")
def engines(base: Path, adapters: dict[Kind, Path]) -> dict[Kind, Path]:
    """An ONNX Runtime engine of each kind."""
    paths: dict[Kind, Path] = {kind: base.parent / f"engine-{kind}" for kind in KINDS}
    for kind, path in paths.items():
        build_engine(base, adapters[kind], path, progress=False)
    return paths


class Counted:
    """An engine whose readings of source images are counted."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.device, self.readings = engine, engine.device, 0

    def __call__(self, inputs: Any) -> torch.Tensor:
        drawn: torch.Tensor = self.engine(inputs)
        return drawn

    def read(self, inputs: Any) -> torch.Tensor:
        self.readings += 1
        stored: torch.Tensor = self.engine.read(inputs)
        return stored


def images_of(number: int) -> list[Image.Image]:
    return [random_image(96, 128), random_image(83, 70, seed=1)][:number]


def edit_of_diffusers(
    family: Family, base: Path, adapter: Path, kind: Kind, images: int, alphas: list[float], spans: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return diffusers' edit with an update on the spans (ST), or on all rows but those of source images (GST), and without."""
    pipeline = family.load_pipeline(base)
    frozen = diffusers_edit(pipeline, images_of(images), PROMPT, None, steps=3)
    text = torch.zeros(1, TEXT_ROWS, 1)
    for span, alpha in zip(spans, alphas, strict=True):
        text[:, list(span) if kind == "st" else slice(None)] = alpha
    noisy = 48

    def update(name: str, a: torch.Tensor, b: torch.Tensor) -> Any:
        rows = family.rows_of(name)

        def hook(_: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            scale = torch.zeros(1, y.shape[1], 1)
            if rows in ("text", "joint"):
                scale[:, :TEXT_ROWS] = text
            if rows in ("image", "joint") and kind == "gst":
                # Diffusers puts the rows of source images before the noisy ones, in the first step only.
                scale[:, -noisy:] = alphas[0]
            return y + scale * (args[0] @ a.T @ b.T)

        return hook

    for name, pair in load_adapter(adapter, family).pairs.items():
        pipeline.transformer.get_submodule(name).register_forward_hook(update(name, *pair))
    return diffusers_edit(pipeline, images_of(images), PROMPT, None, steps=3), frozen


@pytest.mark.parametrize(("kind", "images"), [("st", 1), ("st", 2), ("gst", 1), ("gst", 2)])
def test_an_edit_is_what_diffusers_draws(
    family: Family, base: Path, adapters: dict[Kind, Path], engines: dict[Kind, Path], kind: Kind, images: int
) -> None:
    assert family_of(base) is family
    parts, alphas = (PARTS, [0.75, -0.5]) if kind == "st" else (PARTS[:1], [0.6])
    expected = None
    for editor in (SliderEditor.from_pretrained(base, adapters[kind]), SliderEditor.from_engine(engines[kind])):
        prepared = editor.prepare(images_of(images), parts, prompt=PROMPT, seed=5)
        drawn = editor.render_tensor(prepared, [[1 - alpha for alpha in alphas], [1.0] * len(alphas)], steps=3)
        expected = expected or edit_of_diffusers(family, base, adapters[kind], kind, images, alphas, prepared.spans)
        with_sliders, frozen = expected
        assert (drawn[0] - with_sliders).abs().max() <= 1e-4
        assert (drawn[1] - frozen).abs().max() <= 1e-4
        assert (with_sliders - frozen).abs().max() > 2e-3


@pytest.mark.parametrize("images", [1, 2])
def test_a_gst_edit_is_what_diffusers_draws_with_peft_on_all_rows_but_those_of_the_source(
    family: Family, base: Path, adapters: dict[Kind, Path], engines: dict[Kind, Path], images: int
) -> None:
    """PEFT cannot leave rows out of a call, so it is off while diffusers reads the source images in its first step."""
    editor, strength = SliderEditor.from_engine(engines["gst"]), 0.4
    prepared = editor.prepare(images_of(images), PARTS[:1], prompt=PROMPT, seed=5)
    drawn = editor.render_tensor(prepared, [[strength]], steps=3)

    pipeline = family.load_pipeline(base)
    pipeline.load_lora_weights(adapters["gst"].parent, weight_name=adapters["gst"].name, adapter_name="gst")
    pipeline.set_adapters("gst", 1 - strength)
    forward = pipeline.transformer.forward
    modes = []

    def apart(**given: Any) -> Any:
        modes.append(given["kv_cache_mode"])
        if given["kv_cache_mode"] == "cached":
            return forward(**given)
        pipeline.transformer.disable_lora()
        cache = forward(**given)[1]
        pipeline.transformer.enable_lora()
        source = given.pop("num_ref_tokens")
        noisy = {name: given[name][:, source:] for name in ("hidden_states", "img_ids")}
        return forward(**given | noisy | {"kv_cache": cache, "kv_cache_mode": "cached"})[0], cache

    pipeline.transformer.forward = apart
    expected = diffusers_edit(pipeline, images_of(images), PROMPT, None, steps=3)
    assert modes == ["extract", "cached", "cached"]
    assert (drawn[0] - expected).abs().max() <= 1e-4


def test_moved_sliders_and_new_prompts_do_not_read_the_image_again(engines: dict[Kind, Path]) -> None:
    editor, cache = SliderEditor.from_engine(engines["gst"]), EncodingCache(2**24)
    editor.engine = counted = Counted(editor.engine)
    prepared = editor.prepare(images_of(1), PARTS[:1], prompt=PROMPT, remember=cache)
    assert counted.readings == 1
    editor.render_tensor(prepared, [[value / 12] for value in range(12)], steps=2)
    editor.render_tensor(prepared, [[2.0]], steps=3)
    other = editor.prepare(images_of(1), PARTS[1:], seed=7, remember=cache)
    assert counted.readings == 1
    assert other.conditioning.inputs["reference_keys_values"] is prepared.conditioning.inputs["reference_keys_values"]
    editor.prepare(images_of(2), PARTS[1:], remember=cache)
    assert counted.readings == 2
    editor.prepare(images_of(1), PARTS[1:], remember=EncodingCache(2**10))
    assert counted.readings == 3, "larger than the cache, so not kept"


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("kind", KINDS)
def test_an_inductor_engine_captures_nothing_more_for_other_settings(
    base: Path, adapters: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    build_engine(base, adapters[kind], tmp_path / "engine", BuildSettings("inductor"), progress=False)
    editor, eager = SliderEditor.from_engine(tmp_path / "engine"), SliderEditor.from_pretrained(base, adapters[kind])
    captured, bind = [], InductorEngine._bind

    def watched(self: InductorEngine, *args: Any) -> Any:
        captured.append(args[-1])
        return bind(self, *args)

    monkeypatch.setattr(InductorEngine, "_bind", watched)
    prepared = editor.prepare(images_of(1), PARTS[:1], prompt=PROMPT, seed=5)
    for setting in range(13):
        drawn = editor.render_tensor(prepared, [[setting / 12]], steps=2)
        assert captured == [1, 0], "one reading of the source image and one step"
        if setting == 5:
            expected = eager.render_tensor(eager.prepare(images_of(1), PARTS[:1], prompt=PROMPT, seed=5), [[5 / 12]], steps=2)
            assert (drawn - expected).abs().max() <= 1e-4


@pytest.mark.usefixtures("as_traced")
def test_keys_and_values_are_copied_once_per_edit_in_the_engines_dtype(
    base: Path, adapters: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BuildSettings("inductor", dtype="bfloat16")
    manifest = build_engine(base, adapters["st"], tmp_path / "engine", settings, progress=False)
    # 4 blocks, keys and values, 64 rows, 2 heads of 16, bfloat16.
    assert engine_footprint(tmp_path / "engine", manifest, base).keys_values == 4 * 2 * 64 * 2 * 16 * 2
    result = verify_engine(tmp_path / "engine", random_image(), [Slider(part) for part in PARTS], steps=1)
    assert result.passed, result.verdict
    editor = SliderEditor.from_engine(tmp_path / "engine")
    prepared, other = (editor.prepare(image, PARTS[:1]) for image in (random_image(seed=2), random_image(seed=3)))
    stored = prepared.conditioning.inputs["reference_keys_values"]
    assert stored.dtype == torch.bfloat16
    copied, copy = [], torch.Tensor.copy_

    def watched(self: torch.Tensor, value: torch.Tensor, *args: Any) -> torch.Tensor:
        if value.shape == stored.shape:
            copied.append(value)
        return copy(self, value, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    inputs = editor.frozen_inputs(prepared, 1)
    first = editor.engine(inputs).clone()
    copied.clear()
    editor.engine(inputs | {"timestep": torch.tensor([0.5])})
    assert copied == [], "the next step takes what the engine has"
    second = editor.engine(editor.frozen_inputs(other, 1)).clone()
    assert len(copied) == 1
    again = inputs | {"reference_keys_values": stored}
    assert torch.equal(editor.engine(again), first)
    stored.copy_(other.conditioning.inputs["reference_keys_values"])
    copied.clear()
    assert not torch.equal(editor.engine(again), first)
    assert len(copied) == 1, "changed in place"
    assert not torch.equal(second, first)


def test_the_servers_cache_holds_the_keys_and_values_of_an_image(
    engines: dict[Kind, Path], caplog: pytest.LogCaptureFixture
) -> None:
    editor = SliderEditor.from_engine(engines["st"])
    needed = 4 * 2 * 64 * 2 * 16 * 4
    caplog.set_level("INFO", "slideredit_rt.notes")
    assert cache_size(ServeSettings(engines["st"]), editor) == 256 * 2**20 + needed
    assert cache_size(ServeSettings(engines["st"], cache_mib=1), editor) == 2**20
    assert not caplog.messages
    assert cache_size(ServeSettings(engines["st"], cache_mib=0), editor) == 0
    assert caplog.messages == [
        "--cache-mib 0 is less than the 1 MiB of an image's keys and values, so every edit reads its source images again; give "
        "more, or leave it out"
    ]


def test_rows_of_a_batch_share_an_image_and_differ_in_images(engines: dict[Kind, Path]) -> None:
    editor, cache = SliderEditor.from_engine(engines["st"]), EncodingCache(2**24)
    edits = [(0, 0.2, PARTS[0]), (0, 1.4, PARTS[1]), (1, 0.2, PARTS[0])]
    sources = [random_image(96, 128), random_image(96, 128, seed=1)]
    prepared = [editor.prepare(sources[image], [part], prompt=PROMPT, remember=cache) for image, _, part in edits]
    rows = [
        row
        for one, (_, strength, _) in zip(prepared, edits, strict=True)
        for row in make_rows(editor, one, [[strength]], [3], steps=2)
    ]
    assert len({row.key for row in rows}) == 1
    stored = [one.conditioning.inputs["reference_keys_values"] for one in prepared]
    same = Batch(editor, rows[:2])
    assert same.inputs["reference_keys_values"].data_ptr() == stored[0].data_ptr(), "no copy of what all rows share"
    batch = Batch(editor, rows)
    assert batch.inputs["reference_keys_values"].shape[2] == 2
    assert batch.inputs["reference"].tolist() == [0, 0, 1]
    while not rows[0].done:
        batch.advance()
    for row, (image, strength, part) in zip(rows, edits, strict=True):
        alone = editor.prepare(sources[image], [part], prompt=PROMPT, seed=3)
        expected = editor.render_tensor(alone, [[strength]], steps=2)
        assert (editor.decode(row.latents, row.height, row.width) - expected).abs().max() <= 1e-4


def test_guidance_against_a_negative_prompt_uses_the_same_keys_and_values(base: Path, adapters: dict[Kind, Path]) -> None:
    editor = SliderEditor.from_pretrained(base, adapters["st"])
    editor.engine = counted = Counted(editor.engine)
    sources = [random_image(96, 128), random_image(96, 128, seed=1)]
    prepared = [editor.prepare(one, PARTS, seed=3, true_cfg_scale=2.0, negative_prompt="blurred") for one in sources]
    rows = [row for one in prepared for row in make_rows(editor, one, [[0.2, 1.0]], [3], steps=2)]
    batch = Batch(editor, rows)
    assert batch.negative is not None
    assert batch.negative["reference_keys_values"] is batch.inputs["reference_keys_values"]
    while not rows[0].done:
        batch.advance()
    for row, one in zip(rows, prepared, strict=True):
        expected = editor.render_tensor(one, [[0.2, 1.0]], steps=2)
        assert (editor.decode(row.latents, row.height, row.width) - expected).abs().max() <= 1e-5
    assert counted.readings == 2


def test_the_server_reads_an_image_once(engines: dict[Kind, Path]) -> None:
    image = images_of(1)[0]

    def edit(client: httpx.Client, strength: float) -> Image.Image:
        fields = {"prompt": PARTS[0], "seed": "3", "sliders": json.dumps([{"instruction": PARTS[0], "strength": strength}])}
        files = [("image", ("0.png", as_file(image), "image/png"))]
        return image_of(client.post("/v1/images/edits", files=files, data=fields).json()["data"][0])

    with serving(engines["st"]) as address, httpx.Client(base_url=address, timeout=60) as client:
        drawn = [edit(client, strength) for strength in (0.4, 1.6)]
        metrics = client.get("/metrics").text
    assert 'slideredit_cache_lookups_total{kind="keys_values",result="miss"} 1.0' in metrics
    assert 'slideredit_cache_lookups_total{kind="keys_values",result="hit"} 1.0' in metrics
    expected = SliderEditor.from_engine(engines["st"]).edit(image, [Slider(PARTS[0], 1.6)], prompt=PARTS[0], seed=3)
    assert drawn[1].tobytes() == expected.tobytes()
    assert drawn[0].tobytes() != drawn[1].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_rtx_builds_a_plan_that_takes_a_reading_and_a_step(
    base: Path,
    adapters: dict[Kind, Path],
    engines: dict[Kind, Path],
    tmp_path: Path,
    kind: Kind,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ["build", "--base", str(base), "--adapter", str(adapters[kind]), "--backend", "tensorrt-rtx", "--targets", "sm89"]
    sizes = ["--resolution", str(SIDE), "--max-text-rows", str(TEXT_ROWS), "--batch", "4"]
    assert cli.main([*command, *sizes, "--out", str(tmp_path / "rtx"), "--quiet"]) == 0
    manifest, called = read_manifest(tmp_path / "rtx"), []
    assert manifest.ranges["image_rows"] == manifest.ranges["reference_rows"] == [1, 64, 66]
    shared = ("batch", "references", "sliders")
    assert {axis: manifest.reading_ranges[axis] for axis in shared} == {axis: manifest.ranges[axis] for axis in shared}
    editor = SliderEditor.from_engine(engines[kind])

    class Checked(Counted):
        """An engine whose requests are checked against the plan's profiles."""

        def __call__(self, inputs: Any) -> torch.Tensor:
            called.append(check_request(manifest, inputs))
            return super().__call__(inputs)

        def read(self, inputs: Any) -> torch.Tensor:
            called.append(check_request(manifest, reading_request(manifest, inputs), reading=True))
            return super().read(inputs)

    editor.engine = Checked(editor.engine)
    prepared = editor.prepare(images_of(1), PARTS[:1])
    editor.render(prepared, [[0.3]], steps=1)
    assert [(sizes["text_rows"], sizes["reference_rows"], sizes["kept_rows"]) for sizes in called] == [
        (0, 0, 48),
        (TEXT_ROWS, 48, 0),
    ]
    assert all(found.passed for found in compare_backbones(editor, editor.engine, None, prepared))
    assert max(sizes["batch"] for sizes in called) == 4
    assert cli.main(["inspect", str(tmp_path / "rtx")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "profile    kept_rows 0 to 0, usually 0" in lines
    assert "reading    kept_rows 1 to 66, usually 64" in lines
    assert cli.main(["verify", str(tmp_path / "rtx")]) == 2
    assert "the engine needs an NVIDIA GPU (sm89)" in capsys.readouterr().err


def test_a_plan_that_leaves_out_the_batch_of_a_reading_is_refused(base: Path, family: Family) -> None:
    with pytest.raises(SliderEditError, match=r"in a batch of 1, which .* 2,4,8 leave out; pass --batch 1,4,8"):
        get_backend("tensorrt-rtx").precheck(family, base, BuildSettings("tensorrt-rtx", batch=(2, 4, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_verification_compares_the_reading_of_the_image_as_well(
    engines: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    sliders = [Slider(part) for part in PARTS][: {"st": 2, "gst": 1}[kind]]
    result = verify_engine(engines[kind], random_image(), sliders, steps=2)
    assert result.passed, result.verdict
    assert result.comparisons[0].case == "source image"
    from slideredit_rt.engines.onnxruntime import OnnxRuntimeEngine

    read = OnnxRuntimeEngine.read
    monkeypatch.setattr(OnnxRuntimeEngine, "read", lambda self, inputs: read(self, inputs) * 1.01)
    assert not verify_engine(engines[kind], random_image(), sliders, steps=2).comparisons[0].passed


@pytest.mark.slow
def test_engines_in_half_precision_and_of_a_quantised_base_pass(base: Path, adapters: dict[Kind, Path], tmp_path: Path) -> None:
    command = ["quantize", "--base", str(base), "--precision", "int8", "--out", str(tmp_path / "int8"), "--quiet"]
    assert cli.main(command) == 0
    build_engine(tmp_path / "int8", adapters["st"], tmp_path / "engine", progress=False)
    result = verify_engine(tmp_path / "engine", random_image(), [Slider(part) for part in PARTS], steps=2)
    assert result.passed, result.verdict
    half = SliderEditor.from_pretrained(base, adapters["st"], dtype=torch.bfloat16)
    assert half.prepare(images_of(1), PARTS).conditioning.inputs["reference_keys_values"].dtype == torch.bfloat16
    assert half.edit(images_of(1), [Slider(PARTS[0], 0.3)], steps=2).size == (96, 128)


def test_the_memory_of_keys_and_values_is_planned_with(
    base: Path, engines: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    footprint = engine_footprint(engines["st"], read_manifest(engines["st"]), base)
    # 4 blocks, keys and values, 64 rows, 2 heads of 16, float32.
    assert footprint.keys_values == 4 * 2 * 64 * 2 * 16 * 4
    cached = [ServerParts(cache=2**20, caches_keys_values=room) for room in (False, True)]
    assert [engine_footprint(engines["st"], read_manifest(engines["st"]), base, server=parts).cache for parts in cached] == [
        2**20,
        2**20 + footprint.keys_values,
    ]
    large = type(footprint)(**{**vars(footprint), "keys_values": 2**30})
    (small, more) = (plan_memory(one, 8 * 2**30) for one in (footprint, large))
    assert more.keys_values_gib == 1.0
    assert small.max_batch == 16
    assert more.max_batch == 6, "8 GiB less what is reserved hold the keys and values of six images"


def test_adapters_of_the_plain_family_fit_if_they_leave_reference_rows_out(
    base: Path, adapters: dict[Kind, Path], tmp_path: Path
) -> None:
    for kind in KINDS:
        save_adapter(flux2_adapter(base, kind, all_projections=True), tmp_path / f"{kind}.safetensors")
    drawn = [
        SliderEditor.from_pretrained(base, adapter).edit(images_of(1), [Slider(PARTS[0], 0.3)], steps=2)
        for adapter in (adapters["st"], tmp_path / "st.safetensors")
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    reason = r"gst\.safetensors' was trained for flux2 on the rows of source images as well.*use a flux2 base"
    with pytest.raises(SliderEditError, match=reason):
        SliderEditor.from_pretrained(base, tmp_path / "gst.safetensors")
    with pytest.raises(SliderEditError, match=reason):
        build_engine(base, tmp_path / "gst.safetensors", tmp_path / "engine", progress=False)
    assert not (tmp_path / "engine").exists()
    with pytest.raises(SliderEditError, match="was trained for flux2_kv, not for flux2"):
        load_adapter(adapters["st"], get_family("flux2"))
    # Names alone cannot tell the families apart: a file that does not state one is the plain family's.
    save_adapter(flux2_adapter(base, "gst"), tmp_path / "folder", "diffusers")
    assert load_adapter(tmp_path / "folder").family == "flux2"


def test_an_edit_that_does_not_fit_its_images_is_refused(base: Path, adapters: dict[Kind, Path]) -> None:
    editor = SliderEditor.from_pretrained(base, adapters["st"])
    prepared, other = (editor.prepare(images_of(number), PARTS) for number in (1, 2))
    inputs = prepared.conditioning.inputs
    stored = inputs.pop("reference_keys_values")
    with pytest.raises(SliderEditError, match=r"keys and values of the source images are missing.*prepare the edit"):
        editor.render(prepared, [[0.5, 0.5]], steps=1)
    inputs["reference_keys_values"] = other.conditioning.inputs["reference_keys_values"]
    with pytest.raises(SliderEditError, match="of 68 image rows, but the source images have 48; they were changed"):
        editor.render(prepared, [[0.5, 0.5]], steps=1)
    inputs["reference_keys_values"] = stored
    editor.render(prepared, [[0.5, 0.5]], steps=1)


def refuse_an_engine_without_readings(base: Path, adapter: Path, out: Path) -> None:
    family = get_family("flux2_kv")
    pipeline = family.load_pipeline(base)

    def engine(inputs: Any) -> torch.Tensor:
        return family.run(pipeline.transformer, inputs)

    assert not isinstance(engine, Reader)
    config = dict(pipeline.transformer.config)
    SliderEditor(family, pipeline, engine, config, Controls("st"), max_batch=1, max_sliders=2).prepare(images_of(1), PARTS)


def refuse_a_backend_without_readings(base: Path, adapter: Path, out: Path) -> None:
    build_engine(base, adapter, out, BuildSettings("toy"), progress=False)


def refuse_training(base: Path, adapter: Path, out: Path) -> None:
    family, config = get_family("flux2_kv"), SuppressionConfig(kind="st", target="remaining", steps=1)
    data: Any = None
    SuppressionTrainer(family, family.load_pipeline(base), data, config, out)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (refuse_an_engine_without_readings, "which this engine does not have; build the engine from this base again"),
        (refuse_a_backend_without_readings, r"toy cannot build engines.*use --backend inductor or onnxruntime or tensorrt or"),
        (refuse_training, "training on a flux2_kv base is not supported; train an ST adapter on a flux2 base"),
    ],
)
def test_what_cannot_read_images_once_is_refused(
    base: Path,
    adapters: dict[Kind, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempt: Callable[[Path, Path, Path], None],
    reason: str,
) -> None:
    monkeypatch.setitem(BACKENDS, "toy", Toy())
    with pytest.raises(SliderEditError, match=reason):
        attempt(base, adapters["st"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_engine_and_its_base_are_of_the_same_family(base: Path, engines: dict[Kind, Path], tmp_path: Path) -> None:
    plain = save_tiny_checkpoint(tmp_path / "plain")
    with pytest.raises(SliderEditError, match=r"is a flux2, but engine .* was built from a flux2_kv"):
        SliderEditor.from_engine(engines["st"], base=plain)
    with pytest.raises(SliderEditError, match="reads its source images in a call of their own"):
        export_triton(engines["st"], tmp_path / "models")
    assert not (tmp_path / "models").exists()

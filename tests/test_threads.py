"""Objects that several threads share: what each of them gets is, bit for bit, what it gets alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.compat import SliderEditFluxKontextPipeline
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import inductor, open_engine
from slideredit_rt.engines.inductor import InductorEngine
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.settings import RunSettings

RED, DARK = "make the circle red", "make the background dark"
T = TypeVar("T")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Torch's own threads; with several, a sum may be made in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def together(jobs: list[Callable[[], T]], threads: int) -> list[T]:
    """The results of jobs that begin at the same time on so many threads."""
    ready = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=ready.wait) as pool:
        return list(pool.map(lambda job: job(), jobs))


def edits(editor: SliderEditor, scene: Image.Image, count: int, steps: int) -> list[Callable[[], Tensor]]:
    """Edits of different seeds, prompts, numbers of sliders and sizes."""
    wide = scene.resize((128, 64))
    kinds: list[tuple[Image.Image, list[str]]] = [(scene, [RED]), (scene, [DARK, RED]), (wide, [RED]), (scene, [DARK])]

    def edit(seed: int) -> Tensor:
        image, sliders = kinds[seed % len(kinds)]
        prepared = editor.prepare(image, sliders, seed=seed)
        return editor.render_tensor(prepared, [[0.5 + 0.1 * seed] * len(sliders)], steps=steps)

    return [lambda seed=seed: edit(seed) for seed in range(count)]  # type: ignore[misc]


def same(actual: list[Any], expected: list[Any]) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("threads", [2, 8])
def test_an_onnx_runtime_editor(engines: dict[str, Path], scene: Image.Image, threads: int) -> None:
    editor = SliderEditor.from_engine(engines["st"], run=RunSettings(threads=1))
    jobs = edits(editor, scene, 8, steps=8)
    alone = [job() for job in jobs]
    assert same(together(jobs * 2, threads), alone * 2)


def test_an_eager_editor(scene: Image.Image) -> None:
    editor = SliderEditor.from_pretrained("shapes-kontext", "shapes-st")
    jobs = edits(editor, scene, 4, steps=2)
    alone = [job() for job in jobs]
    assert same(together(jobs, 2), alone)


def test_the_drop_in_pipeline(scene: Image.Image) -> None:
    pipe = SliderEditFluxKontextPipeline.from_pretrained(resolve_base("shapes-kontext"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_stlora("shapes-st")

    def edit(pipe: Any, alpha: float, prompt: str) -> Tensor:
        images: Tensor = pipe(
            scene,
            prompt,
            subprompts_list=[RED],
            slider_alpha_list=[alpha],
            num_inference_steps=3,
            max_area=64 * 64,
            _auto_resize=False,
            max_sequence_length=24,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        return images

    cases = [(0.0, RED), (1.0, f"{RED} and {DARK}"), (-0.5, f"{DARK} and {RED}"), (0.5, RED)]
    alone = [edit(pipe, *case) for case in cases]
    assert same(together([lambda c=case: edit(pipe, *c) for case in cases], 2), alone)  # type: ignore[misc]
    # A copy, as for another device, has a lock of its own.
    twin = copy.deepcopy(pipe)
    with twin._lock:
        assert together([lambda: torch.equal(edit(pipe, *cases[0]), alone[0])], 1) == [True]


def test_an_inductor_engine(family: Family, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "COMPILER", "eager")
    torch._dynamo.reset()
    transformer = family.load_pipeline(resolve_base("shapes-kontext")).transformer
    backbone = SliderBackbone(family, transformer, load_adapter("shapes-st", family)).eval().requires_grad_(False)
    manifest = open_engine(engines["st"])[0]
    engine = InductorEngine(backbone, manifest)
    requests = [example_inputs(backbone, manifest.config, 1 + seed % 2, 8, 16, 1, seed=seed) for seed in range(8)]
    # Clones: an output is valid until its thread's next call.
    jobs: list[Callable[[], torch.Tensor]] = [lambda inputs=inputs: engine(inputs).clone() for inputs in requests]  # type: ignore[misc]
    alone = [job() for job in jobs]
    assert same(together(jobs * 4, 4), alone * 4)
    torch._dynamo.reset()


def test_an_output_outlives_another_threads_call(engines: dict[str, Path], family: Family, pipeline: Any) -> None:
    manifest, engine = open_engine(engines["st"], RunSettings(threads=1))
    backbone = SliderBackbone(family, pipeline.transformer, load_adapter("shapes-st", family))
    first, second = (example_inputs(backbone, manifest.config, 2, 24, 128, 1, seed=seed) for seed in (0, 1))
    mine = engine(first)
    kept = mine.clone()
    theirs = together([lambda: engine(second)], 1)[0]
    assert torch.equal(mine, kept)
    assert not torch.equal(mine, theirs)


def test_a_tensor_where_another_dtype_was_bound_is_refused(engines: dict[str, Path], family: Family, pipeline: Any) -> None:
    """Memory of a freed tensor is given to the next one of its size."""
    manifest, engine = open_engine(engines["st"], RunSettings(threads=1))
    backbone = SliderBackbone(family, pipeline.transformer, load_adapter("shapes-st", family))
    inputs = example_inputs(backbone, manifest.config, 2, 24, 128, 1)
    engine(inputs)
    with pytest.raises(SliderEditError, match="'alpha' must be contiguous float32"):
        engine(inputs | {"alpha": inputs["alpha"].view(torch.int32)})


def test_tokenizers_of_an_editor_are_used_by_one_thread_at_a_time(st_editor: SliderEditor, scene: Image.Image) -> None:
    """They answer another thread with 'Already borrowed' while one changes how they truncate."""
    prompts = [f"{RED} and {'very ' * count}dark" for count in range(1, 9)]
    jobs: list[Callable[[], Any]] = [lambda p=p: st_editor.prepare(scene, [RED], prompt=p).conditioning.inputs for p in prompts]  # type: ignore[misc]
    alone = [job() for job in jobs]
    for actual, expected in zip(together(jobs * 3, 8), alone * 3, strict=True):
        assert same(list(actual.values()), list(expected.values()))


def test_a_pipeline_is_inside_one_call_at_a_time(st_editor: SliderEditor, scene: Image.Image) -> None:
    """An autoencoder or a text encoder may keep state between its layers."""
    inside, most, count = 0, 0, threading.Lock()

    class Watched(type(st_editor.family)):  # type: ignore[misc]
        def _watch(self, call: Callable[[], T]) -> T:
            nonlocal inside, most
            with count:
                inside += 1
                most = max(most, inside)
            try:
                return call()
            finally:
                with count:
                    inside -= 1

        def tokenize(self, *args: Any) -> Any:
            return self._watch(lambda: super(Watched, self).tokenize(*args))

        def encode_prompt(self, *args: Any) -> Any:
            return self._watch(lambda: super(Watched, self).encode_prompt(*args))

        def encode_sources(self, *args: Any) -> Any:
            return self._watch(lambda: super(Watched, self).encode_sources(*args))

        def decode(self, *args: Any) -> Any:
            return self._watch(lambda: super(Watched, self).decode(*args))

    editor = copy.copy(st_editor)
    editor.family = Watched()
    together(edits(editor, scene, 8, steps=1), 4)
    assert most == 1

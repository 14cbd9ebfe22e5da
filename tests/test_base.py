"""Base checkpoints: what is wrong with one is said in one sentence, and an engine notices when its base changes."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from PIL import Image
from qwen_checkpoint import save_tiny_checkpoint
from safetensors.torch import load_file, save_file

from slideredit_rt import files
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import component_files, components, fingerprint_base, read_weights, weight_files
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import read_manifest
from slideredit_rt.engines.manifest import DIGESTS
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Family, get_family
from slideredit_rt.sliders import Slider
from slideredit_rt.verify import Origins, verify_engine

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP, T5 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
T5_WORDS = "tokenizer_2/tokenizer.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
SLIDER = Slider("make the circle red", 0.5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base."""
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and, beside it, an engine that is linked with it."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(resolve_base("shapes-kontext"), root / "base")
    build_engine(root / "base", "shapes-st", root / "engine", progress=False)
    return root


@pytest.fixture
def pair(built: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Base and engine of `built`, copied with their hard link, at the price that every file has another inode."""
    shutil.copytree(built / "base", tmp_path / "base")
    shutil.copytree(built / "engine", tmp_path / "engine")
    linked = tmp_path / "engine" / WEIGHTS
    linked.unlink()
    os.link(tmp_path / "base" / "transformer" / WEIGHTS, linked)
    read_manifest(tmp_path / "engine")
    return tmp_path / "base", tmp_path / "engine"


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop_tensor(file: Path) -> None:
    state = load_file(file)
    del state[sorted(state)[-1]]
    save_file(state, file, metadata={"format": "pt"})


def reshape_tensor(file: Path) -> None:
    state = load_file(file)
    state[sorted(state)[-1]] = torch.zeros(3, 3)
    save_file(state, file, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "T5 without its vocabulary": (
        lambda b: (b / T5_WORDS).unlink(),
        "tokenizer_2' lacks spiece.model",
    ),
    "CLIP without its vocabulary": (
        lambda b: (b / "tokenizer/tokenizer.json").unlink(),
        "tokenizer' lacks merges.txt and vocab.json",
    ),
    "CLIP without its settings": (lambda b: (b / "tokenizer/tokenizer_config.json").unlink(), "lacks tokenizer_config.json"),
    "an empty vocabulary": (
        lambda b: edit_json(
            b / T5_WORDS,
            model={"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]},
        ),
        "knows none of the words",
    ),
    "a broken vocabulary": (
        lambda b: (b / T5_WORDS).write_text("{"),
        "tokenizer_2' of the base (",
    ),
    "no weights of T5": (
        lambda b: (b / T5).unlink(),
        "has neither model.safetensors",
    ),
    "a variant only": (
        lambda b: (b / T5).rename(b / "text_encoder_2/model.fp16.safetensors"),
        "only the variant model.fp16.safetensors",
    ),
    "a pointer for T5": (lambda b: (b / T5).write_bytes(POINTER), "is a Git LFS pointer"),
    "a pointer for a vocabulary": (lambda b: (b / T5_WORDS).write_bytes(POINTER), "is a Git LFS pointer"),
    "a pointer for the transformer": (lambda b: (b / "transformer" / WEIGHTS).write_bytes(POINTER), "is a Git LFS pointer"),
    "half of CLIP": (
        lambda b: os.truncate(b / CLIP, 5000),
        "is incomplete",
    ),
    "CLIP without a tensor": (lambda b: drop_tensor(b / CLIP), "lacks the tensor "),
    "the VAE without a tensor": (lambda b: drop_tensor(b / "vae" / WEIGHTS), "lacks the tensor "),
    "T5 with another shape": (lambda b: reshape_tensor(b / T5), "its configuration expects"),
    "no scheduler file": (
        lambda b: (b / "scheduler/scheduler_config.json").unlink(),
        "scheduler' of the base (",
    ),
    "no scheduler": (lambda b: shutil.rmtree(b / "scheduler"), "lacks the folder scheduler"),
    "no VAE configuration": (lambda b: (b / "vae/config.json").unlink(), "vae/config.json"),
    "no T5 configuration": (
        lambda b: (b / "text_encoder_2/config.json").unlink(),
        "text_encoder_2' of the base (",
    ),
    "a quantised T5": (
        lambda b: edit_json(b / "text_encoder_2/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "is quantised (bitsandbytes)",
    ),
    "an unknown class": (
        lambda b: edit_json(b / "model_index.json", text_encoder=["transformers", "CLIPTextModelOfTomorrow"]),
        "needs a CLIPTextModelOfTomorrow as its text_encoder",
    ),
    "a component left out": (
        lambda b: edit_json(b / "model_index.json", vae=[None, None]),
        "has no vae in its",
    ),
    "a component elsewhere": (
        lambda b: edit_json(b / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]}),
        "describes its ../vae as",
    ),
    "a list for an index": (lambda b: (b / "model_index.json").write_text("[]"), "is not a diffusers model index"),
    "a deep index": (lambda b: (b / "model_index.json").write_text('{"a":' * 100_000), "is not a diffusers model index"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_refused_in_one_sentence_at_build_and_when_it_is_opened(
    base: Path, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, message = DAMAGES[damage]
    change(base)
    command = ["build", "--base", str(base), "--adapter", "shapes-st", "--out", str(tmp_path / "engine"), "--quiet"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "engine").exists()
    with pytest.raises(SliderEditError) as opened:
        family.load_pipeline(base)
    assert message in str(opened.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "processor" / "tokenizer.json").unlink(), "processor' lacks merges.txt and vocab.json"),
        (lambda b: (b / "tokenizer" / "tokenizer.json").unlink(), "tokenizer' lacks merges.txt and vocab.json"),
        (lambda b: shutil.rmtree(b / "processor"), "lacks the folder processor"),
        (lambda b: drop_tensor(b / "text_encoder" / "model.safetensors"), "lacks the tensor "),
        (lambda b: (b / "vae" / WEIGHTS).write_bytes(POINTER), "is a Git LFS pointer"),
    ],
)
def test_a_damaged_qwen_base_is_refused(qwen: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(qwen, tmp_path / "base")
    family = get_family("qwen_image_edit")
    family.check_base(tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(SliderEditError, match=message):
        family.load_pipeline(tmp_path / "base")
    with pytest.raises(SliderEditError, match=message):
        build_engine(tmp_path / "base", None, tmp_path / "engine", progress=False)
    assert not (tmp_path / "engine").exists()


def test_weights_that_are_not_loaded_are_not_asked_for(base: Path, family: Family) -> None:
    (base / "text_encoder_2" / "pytorch_model.bin").write_bytes(b"another format")
    (base / "text_encoder_2" / "model.fp16.safetensors").write_bytes(b"a variant")
    family.check_base(base)


# --- Which files are read ----------------------------------------------------------------------------------------------


def test_of_a_single_file_beside_shards_the_one_is_exported_that_diffusers_loads(
    base: Path, tmp_path: Path, family: Family
) -> None:
    folder = base / "transformer"
    other = FluxTransformer2DModel.from_pretrained(folder)
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "other", max_shard_size="2MB")
    for file in (tmp_path / "other").iterdir():
        shutil.copy(file, folder / file.name)
    loaded = family.load_pipeline(base).transformer.proj_out.weight
    assert torch.equal(loaded, other.proj_out.weight)
    build_engine(base, "shapes-st", tmp_path / "engine", progress=False)
    assert sorted(read_manifest(tmp_path / "engine").links) == sorted(
        p.name for p in (tmp_path / "other").glob("*.safetensors")
    )
    assert verify_engine(tmp_path / "engine", Image.new("RGB", (64, 64)), [SLIDER], steps=1).passed


def test_of_a_single_file_beside_shards_transformers_loads_the_single_one(base: Path, tmp_path: Path, family: Family) -> None:
    folder = base / "text_encoder_2"
    encoder = transformers.T5EncoderModel.from_pretrained(folder)
    kept = encoder.shared.weight.detach().clone()
    with torch.no_grad():
        encoder.shared.weight.mul_(2)
    encoder.save_pretrained(tmp_path / "other", max_shard_size="100KB")
    for file in (tmp_path / "other").glob("model*"):
        shutil.copy(file, folder / file.name)
    assert [file.name for file in weight_files(folder, "transformers")] == ["model.safetensors"]
    assert torch.equal(family.load_pipeline(base, transformer=False).text_encoder_2.shared.weight, kept)
    assert read_weights(folder, "transformers")["shared.weight"].file.name == "model.safetensors"


def test_every_file_that_a_tokenizer_of_transformers_reads_counts(tmp_path: Path) -> None:
    names = set()
    for attribute in dir(transformers):
        if "Tokenizer" in attribute:
            try:
                names |= set(getattr(transformers, attribute).vocab_files_names.values())
            except (AttributeError, ImportError):
                continue  # not a tokenizer, or one that needs a package that is not here
    assert {"merges.txt", "vocab.txt", "spiece.model", "tokenizer.json"} <= names
    for name in names:
        (tmp_path / name).write_text("x")
    assert {file.name for file in component_files(tmp_path, "transformers")} == names


def test_the_fingerprint_covers_what_is_loaded_and_nothing_else(base: Path) -> None:
    before = fingerprint_base(base)
    assert before.keys() == {"model_index.json", *components(base)}
    for folder in ("tokenizer", "tokenizer_2", "transformer", "vae", "text_encoder", "scheduler"):
        for name in (".DS_Store", "._config.json", "README.md", "notes.txt", "Icon\r", "model.fp16.safetensors", "x.bin"):
            (base / folder / name).write_text("beside")
        (base / folder / ".cache").mkdir()
        (base / folder / ".cache" / "config.json").write_text("{}")
    (base / "onnx").mkdir()
    assert fingerprint_base(base) == before
    for component, name in (
        ("tokenizer", "merges.txt"),
        ("tokenizer_2", "spiece.model"),
        ("tokenizer_2", "added_tokens.json"),
        ("text_encoder", "generation_config.json"),
        ("tokenizer", "chat_template.jinja"),
        ("text_encoder", "adapter_model.safetensors"),
    ):
        (base / component / name).write_text("{}")
        changed = {key for key, value in fingerprint_base(base).items() if value != before[key]}
        (base / component / name).unlink()
        assert changed == {component}, name
    for file in component_files(base / "vae", "diffusers"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b" ")
        assert {key for key, value in fingerprint_base(base).items() if value != before[key]} == {"vae"}
        file.write_bytes(content)
    edit_json(base / "model_index.json", _diffusers_version="0.0.0")
    assert fingerprint_base(base) == before


def test_an_engine_opens_with_notes_beside_its_base(pair: tuple[Path, Path]) -> None:
    base, engine = pair
    for folder in ("vae", "tokenizer_2", "transformer"):
        (base / folder / ".DS_Store").write_bytes(b"\0")
        (base / folder / "README.md").write_text("notes")
    SliderEditor.from_engine(engine, base)


# --- A base that changes under an engine -------------------------------------------------------------------------------


def overwrite(file: Path, *, keep_times: bool) -> None:
    """Another weight in the middle of a file, in place."""
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(status.st_size // 2)
        byte = opened.read(1)
        opened.seek(status.st_size // 2)
        opened.write(bytes([byte[0] ^ 0x40]))
    if keep_times:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
def test_weights_that_were_overwritten_in_place_are_noticed(pair: tuple[Path, Path], keep_times: bool) -> None:
    base, engine = pair
    SliderEditor.from_engine(engine, base)
    overwrite(base / "transformer" / WEIGHTS, keep_times=keep_times)
    for _ in range(2):
        with pytest.raises(
            SliderEditError,
            match=rf"links to the checkpoint's file {WEIGHTS}, which is missing or was changed after the build.*--copy-weights",
        ):
            SliderEditor.from_engine(engine, base)


def test_verify_refuses_a_base_whose_transformer_is_another(pair: tuple[Path, Path], scene: Image.Image) -> None:
    base, engine = pair
    weights = base / "transformer" / WEIGHTS
    content = weights.read_bytes()
    # Replaced and not overwritten: the engine keeps the old file.
    weights.unlink()
    weights.write_bytes(content)
    overwrite(weights, keep_times=False)
    read_manifest(engine)
    with pytest.raises(SliderEditError, match=r"is not the one that engine .* was built from: transformer differ"):
        verify_engine(engine, scene, [SLIDER], Origins(str(base)), steps=1)


def test_a_touched_moved_or_relinked_engine_opens_and_is_read_whole_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, engine = pair
    read = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path.name) or real(path))  # type: ignore[func-returns-value]

    def large_files_read(folder: Path) -> int:
        read.clear()
        read_manifest(folder)
        return read.count(WEIGHTS)

    assert large_files_read(engine) == 0
    weights = base / "transformer" / WEIGHTS
    for harmless in (
        lambda: os.utime(weights),
        lambda: weights.chmod(0o600),
        lambda: os.link(weights, tmp_path / "another link"),
    ):
        time.sleep(0.02)  # longer than the clock of a file system's times ticks
        harmless()
        assert (large_files_read(engine), large_files_read(engine)) == (1, 0)
    shutil.copytree(engine, tmp_path / "moved")
    assert (large_files_read(tmp_path / "moved"), large_files_read(tmp_path / "moved")) == (1, 0)
    (engine / WEIGHTS).unlink()
    (engine / WEIGHTS).symlink_to(shutil.copy(weights, tmp_path / "blob"))
    assert (large_files_read(engine), large_files_read(engine)) == (1, 0)
    (engine / DIGESTS).write_text("damaged")
    assert (large_files_read(engine), large_files_read(engine)) == (1, 0)


def test_the_cache_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert files.cache_directory() == Path(tempfile.gettempdir(), ".cache", "slideredit-rt")


def test_an_engine_that_cannot_be_written_is_read_whole_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = pair
    (engine / DIGESTS).unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace, digest, read = os.replace, files.sha256, list[str]()

    def read_only(source: Path, target: Path) -> None:
        if target.parent == engine:
            raise OSError(30, "Read-only file system")
        replace(source, target)

    def noted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(os, "replace", read_only)
    monkeypatch.setattr(files, "sha256", noted)
    read_manifest(engine)
    assert WEIGHTS in read
    read.clear()
    read_manifest(engine)
    assert WEIGHTS not in read, "it was remembered in the user's cache"
    assert not (engine / DIGESTS).exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_copied_weights_survive_a_change_of_the_base(base: Path, tmp_path: Path, scene: Image.Image, backend: str) -> None:
    engine = tmp_path / "engine"
    command = ["build", "--base", str(base), "--adapter", "shapes-st", "--out", str(engine), "--backend", backend, "--quiet"]
    assert main([*command, "--copy-weights"]) == 0
    manifest = read_manifest(engine)
    assert manifest.links == {}
    assert WEIGHTS in manifest.files
    assert not (engine / WEIGHTS).samefile(base / "transformer" / WEIGHTS)
    overwrite(base / "transformer" / WEIGHTS, keep_times=False)
    read_manifest(engine)


def test_an_engine_does_not_open_on_a_base_of_another_family(pair: tuple[Path, Path]) -> None:
    base, engine = pair
    edit_json(base / "model_index.json", _class_name="QwenImageEditPipeline")
    with pytest.raises(SliderEditError, match=r"is a qwen_image_edit, but engine '.*' was built from a flux_kontext; pass the"):
        SliderEditor.from_engine(engine, base)

"""Learned scorers: the real classes with small random weights, against computations of their own."""

import importlib
import pickle
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from scorer_checkpoints import MEAN, PHRASES, SIDE, STD, save_scorer_checkpoints
from torch import Tensor, nn

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.scorers import SCORERS, AttributeScorer, DistanceScorer, Scorer, load_scorer
from slideredit_rt.evaluation.scorers.base import BATCH
from slideredit_rt.evaluation.scorers.distances import Dinov2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small checkpoint per transformers scorer."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_scorer_checkpoints(root)
    return root


@pytest.fixture(scope="module")
def images() -> Tensor:
    """More images than a model is shown at once; values that 8 bits hold exactly."""
    return torch.randint(0, 256, (BATCH + 2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)) / 255


@pytest.fixture(scope="module", params=["clip", "siglip", "blip-itm"])
def attribute_scorer(request: pytest.FixtureRequest, checkpoints: Path) -> Scorer:
    return load_scorer(request.param, str(checkpoints / request.param))


def _normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def _expected(name: str, folder: Path, images: Tensor, phrases: Sequence[str]) -> list[list[float]]:
    """One image and one phrase at a time, from the parts of the model and nothing padded that was not in training."""
    tokenizer, pixels = transformers.AutoTokenizer.from_pretrained(folder), _normalised(images)
    if name == "blip-itm":
        model = transformers.BlipForImageTextRetrieval.from_pretrained(folder)
        ids = [tokenizer(phrase, return_tensors="pt")["input_ids"] for phrase in phrases]
        return [
            [model(i, p[None], use_itm_head=True).itm_score.softmax(-1)[0, 1].item() for i in ids] for p in pixels
        ]  # fmt: skip
    if name == "clip":
        model = transformers.CLIPModel.from_pretrained(folder)
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        ids = [tokenizer(phrase, return_tensors="pt")["input_ids"] for phrase in phrases]
        read = [model.text_projection(model.text_model(i).pooler_output)[0] for i in ids]
    else:
        model = transformers.SiglipModel.from_pretrained(folder)
        seen = model.vision_model(pixels).pooler_output
        rows = [tokenizer(phrase)["input_ids"] for phrase in phrases]
        ids = [torch.tensor([row + [tokenizer.pad_token_id] * (48 - len(row))]) for row in rows]
        read = [model.text_model(i).pooler_output[0] for i in ids]
    return [[F.cosine_similarity(s, r, dim=0).item() for r in read] for s in seen]


@torch.no_grad()
def test_attribute_scores_are_those_of_the_model_itself(
    attribute_scorer: AttributeScorer, checkpoints: Path, images: Tensor
) -> None:
    assert isinstance(attribute_scorer, AttributeScorer)
    scores = attribute_scorer.score(images, PHRASES)
    expected = _expected(attribute_scorer.name, checkpoints / attribute_scorer.name, images, PHRASES)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    # Neither images nor phrases all look alike to it, or nothing was compared.
    assert np.ptp(expected, axis=0).min() > 1e-3
    assert np.ptp(expected, axis=1).min() > 1e-4


def test_an_image_scores_the_same_in_any_batch_and_a_phrase_beside_any_other(
    attribute_scorer: AttributeScorer, images: Tensor
) -> None:
    together = attribute_scorer.score(images, PHRASES)
    for index in (0, BATCH + 1):
        np.testing.assert_allclose(attribute_scorer.score(images[index : index + 1], PHRASES)[0], together[index], atol=1e-5)
    np.testing.assert_allclose(attribute_scorer.score(images, PHRASES[:1]), np.array(together)[:, :1], atol=1e-5)


def test_images_of_another_size_are_resized_by_pillow(checkpoints: Path) -> None:
    scorer = load_scorer("siglip", str(checkpoints / "siglip"))
    assert isinstance(scorer, AttributeScorer)
    large = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(2))
    pixels = (large[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    resized = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    small = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255
    np.testing.assert_allclose(scorer.score(large, PHRASES), scorer.score(small, PHRASES), atol=1e-5)


def test_a_phrase_that_would_be_cut_off_is_refused(attribute_scorer: AttributeScorer, images: Tensor) -> None:
    with pytest.raises(SliderEditError, match=r"'hair hair.* tokens, but the scorer '.*' accepts at most (24|48); shorten it"):
        attribute_scorer.score(images[:1], ["smile", "hair " * 60])


@pytest.fixture(scope="module")
def dinov2(checkpoints: Path) -> Scorer:
    return load_scorer("dinov2", str(checkpoints / "dinov2"))


@torch.no_grad()
def test_dinov2_distance_is_one_minus_the_cosine_of_the_class_tokens(dinov2: Dinov2, checkpoints: Path, images: Tensor) -> None:
    assert isinstance(dinov2, DistanceScorer)
    model = transformers.Dinov2Model.from_pretrained(checkpoints / "dinov2")
    tokens = model.layernorm(model.encoder(model.embeddings(_normalised(images))).last_hidden_state)[:, 0]
    expected = 1 - F.cosine_similarity(tokens, tokens[:1])
    np.testing.assert_allclose(np.array(dinov2.distance(images, images[:1]), float), expected, atol=1e-5)
    assert expected[1:].min() > 0.01
    assert dinov2.distance(images[:1], images[:1]) == pytest.approx([0], abs=1e-6)


def test_a_source_is_embedded_once_however_often_it_is_compared_with(dinov2: Dinov2, images: Tensor) -> None:
    seen = []
    hook = dinov2.vision.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    source = images[-1:]
    first = dinov2.distance(images[:3], source)
    again = dinov2.distance(images[:3], source.clone())
    hook.remove()
    assert first == again
    assert seen == [1, 3, 3]


class _Backbones(types.ModuleType):
    """The layers of torchvision's `alexnet` and `vgg16` that LPIPS reads, with random weights."""

    @staticmethod
    def alexnet(pretrained: bool) -> types.SimpleNamespace:
        pool = {2: nn.MaxPool2d(3, 2), 5: nn.MaxPool2d(3, 2)}
        shapes = iter([(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)])
        layers = [pool[i] if i in pool else nn.Conv2d(*next(shapes)) if i in (0, 3, 6, 8, 10) else nn.ReLU() for i in range(12)]
        return types.SimpleNamespace(features=nn.Sequential(*layers))

    @staticmethod
    def vgg16(pretrained: bool) -> types.SimpleNamespace:
        layers, channels = [], 3
        for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(repeats):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
        return types.SimpleNamespace(features=nn.Sequential(*layers))


@pytest.fixture(scope="module")
def lpips_package() -> Iterator[types.ModuleType]:
    """The package, on torchvision where it works and otherwise (it has no build for every torch) on its backbones' layers."""
    if find_spec("lpips") is None:
        pytest.skip("lpips is not installed; pip install --no-deps lpips")
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("torchvision") is None:
            stand_in: Any = types.ModuleType("torchvision")
            stand_in.__spec__ = ModuleSpec("torchvision", None)
            stand_in.models = _Backbones("torchvision.models")
            patch.setitem(sys.modules, "torchvision", stand_in)
            patch.setitem(sys.modules, "torchvision.models", stand_in.models)
        yield importlib.import_module("lpips")


RELUS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_scorer(
    request: pytest.FixtureRequest, lpips_package: types.ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, nn.Sequential, tuple[int, ...]]:
    """The scorer, and the backbone whose weights it was given as a file."""
    torch.manual_seed(3)
    models = sys.modules["torchvision.models"]
    backbone = {"alex": models.alexnet, "vgg": models.vgg16}[request.param](pretrained=False).features
    suffix = {"alex": "safetensors", "vgg": "pth"}[request.param]
    path = tmp_path_factory.mktemp("lpips") / f"backbone.{suffix}"
    weights = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    return load_scorer(f"lpips-{request.param}", str(path)), backbone, RELUS[request.param]


@torch.no_grad()
def test_lpips_is_the_weighted_difference_of_the_backbones_features(
    lpips_scorer: tuple[Any, nn.Sequential, tuple[int, ...]], lpips_package: types.ModuleType
) -> None:
    scorer, backbone, relus = lpips_scorer
    images = torch.rand(3, 3, 64, 80, generator=torch.Generator().manual_seed(4))
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]
    seen, values = (2 * images - 1 - shift) / scale, []
    path = f"{lpips_package.__path__[0]}/weights/v0.1/{scorer.backbone}.pth"
    learned = torch.load(path, map_location="cpu", weights_only=True)
    for number in range(relus[-1] + 1):
        seen = backbone[number](seen)
        if number in relus:
            unit = seen / seen.norm(dim=1, keepdim=True)
            weight = learned[f"lin{relus.index(number)}.model.1.weight"]
            values.append(F.conv2d((unit - unit[:1]).square(), weight).mean(dim=(1, 2, 3)))
    expected = torch.stack(values).sum(0)
    np.testing.assert_allclose(scorer.distance(images, images[:1]), expected, rtol=1e-4, atol=1e-7)
    assert expected[1:].min() > 0.01
    assert scorer.distance(images[:1], images[:1]) == [0]


def test_lpips_does_not_compare_images_of_two_sizes(lpips_scorer: tuple[Any, nn.Sequential, tuple[int, ...]]) -> None:
    with pytest.raises(SliderEditError, match=r"the edit has 80×64 pixels and its source 64×64; resize one of them"):
        lpips_scorer[0].distance(torch.zeros(1, 3, 64, 80), torch.zeros(1, 3, 64, 64))


def test_lpips_takes_no_backbone_that_is_another_network(lpips_package: types.ModuleType, tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "other.safetensors")
    with pytest.raises(SliderEditError, match=r"scorer 'lpips-alex' cannot be loaded from .*features\.0\.bias"):
        load_scorer("lpips-alex", str(tmp_path / "other.safetensors"))


# The five points of a face, relative to the middle of the 112 pixels that InsightFace crops: the crop is then cut straight out.
LANDMARKS = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]) - 56
FRAME = 640


def _face_detector(path: Path) -> None:
    """Finds a face wherever an 8×8 cell is white, in the form of InsightFace's detectors: two anchors a cell, three strides."""
    nodes, outputs, tensors = [], [], []

    def constant(name: str, value: ArrayLike) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(kind: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **options))
        return output

    constant("column", np.array([-1, 1]))
    pair = constant("pair", np.array([1, 2]))
    offsets = {
        "box": np.full((1, 4), 40, np.float32),
        "points": LANDMARKS.reshape(1, 10).astype(np.float32),
    }
    for group in ("score", "box", "points"):
        for stride in (8, 16, 32):
            cells = node("AveragePool", ["input"], f"{group}{stride}.cells", kernel_shape=[stride] * 2, strides=[stride] * 2)
            white = node("ReduceMin", [cells, constant(f"{group}{stride}.axes", np.array([1]))], f"{group}{stride}.white")
            column = node("Tile", [node("Reshape", [white, "column"], f"{group}{stride}.column"), pair], f"{group}{stride}.two")
            # Every anchor two rows of one value: cell by cell, anchor by anchor.
            column = node("Reshape", [column, "column"], f"{group}{stride}.rows")
            name = f"{group}{stride}"
            if group == "score":
                # A white cell has 127.5 / 128 everywhere; wider ones cannot be white.
                half = constant(f"{name}.limit", np.float32(0.99))
                hit = node("Greater", [column, half], f"{name}.hit")
                node("Cast", [hit], name, to=TensorProto.FLOAT)
            else:
                nothing = node("Mul", [column, constant(f"{name}.zero", np.float32(0))], f"{name}.nothing")
                node("Add", [nothing, constant(f"{name}.offset", offsets[group] / np.float32(stride))], name)
            width = {"score": 1, "box": 4, "points": 10}[group]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width]))
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "height", "width"])
    _write_graph(path, nodes, [image], outputs, tensors)


def _face_recogniser(path: Path) -> None:
    """A convolution and a sum: 112×112 pixels to 8 numbers."""
    kernel = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["seen"], strides=[16, 16]),
        helper.make_node("Sin", ["seen"], ["bent"]),
        helper.make_node("GlobalAveragePool", ["bent"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 8])
    _write_graph(path, nodes, [image], [embedding], [numpy_helper.from_array(kernel, "kernel")])


def _write_graph(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: list[Any]) -> None:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def face_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its computer vision package wants libraries of a desktop.
    pytest.importorskip("insightface", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("faces")
    _face_detector(folder / "det.onnx")
    _face_recogniser(folder / "rec.onnx")
    return folder


@pytest.fixture(scope="module")
def arcface(face_models: Path) -> Scorer:
    return load_scorer("arcface", str(face_models))


def _with_faces(seed: int, *places: tuple[int, int]) -> Tensor:
    """A dim random image `[1, 3, 640, 640]` with a face (a white cell) at each place."""
    image = torch.randint(0, 200, (1, 3, FRAME, FRAME), generator=torch.Generator().manual_seed(seed)) / 255
    for x, y in places:
        image[:, :, y : y + 8, x : x + 8] = 1
    return image


def test_arcface_distance_is_one_minus_the_cosine_of_the_two_faces(arcface: DistanceScorer, face_models: Path) -> None:
    source, edited = _with_faces(5, (320, 240)), _with_faces(6, (160, 400))
    session = onnxruntime.InferenceSession(face_models / "rec.onnx", providers=["CPUExecutionProvider"])
    crops = [source[:, :, 184:296, 264:376], edited[:, :, 344:456, 104:216]]
    a, b = (session.run(None, {"input": (crop.numpy() * 255 - 127.5) / np.float32(127.5)})[0][0] for crop in crops)
    expected = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert expected > 0.05
    distances = arcface.distance(torch.cat([edited, source, edited]), source)
    assert distances == pytest.approx([expected, 0, expected], abs=2e-3)


def test_arcface_needs_exactly_one_face_in_both_images(arcface: DistanceScorer) -> None:
    one, none, two = _with_faces(5, (320, 240)), _with_faces(6), _with_faces(7, (160, 160), (480, 400))
    distances = arcface.distance(torch.cat([none, one, two]), one)
    assert (distances[0], distances[2]) == (None, None)
    assert distances[1] == pytest.approx(0, abs=1e-6)
    for source in (none, two):
        assert arcface.distance(torch.cat([one, source]), source) == [None, None]


def test_a_folder_without_face_models_is_refused(face_models: Path, tmp_path: Path) -> None:
    for copied, lacks in ((), "detection"), (("det.onnx",), "recognition"):
        for name in copied:
            (tmp_path / name).write_bytes((face_models / name).read_bytes())
        with pytest.raises(
            SliderEditError, match=f"'arcface' cannot be loaded from .*it does not contain a face {lacks} model"
        ):
            load_scorer("arcface", str(tmp_path))


def test_an_unknown_scorer_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        SliderEditError, match=r"'clap' is not a scorer; choose from clip, siglip, blip-itm, lpips-alex, .*arcface"
    ):
        load_scorer("clap")


@pytest.mark.parametrize(("name", "package"), [("lpips-alex", "lpips"), ("arcface", "insightface")])
def test_a_missing_package_is_answered_with_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    extra = SCORERS[name].extra
    with pytest.raises(SliderEditError, match=rf"{name}' needs a package .*{package}.*pip install 'slideredit-rt\[{extra}\]'$"):
        load_scorer(name)


@pytest.mark.parametrize("name", sorted(SCORERS.keys() - {"lpips-alex", "lpips-vgg"}))
def test_weights_that_are_not_there_are_named(name: str, tmp_path: Path) -> None:
    if name == "arcface":
        pytest.importorskip("insightface", exc_type=ImportError)
    with pytest.raises(SliderEditError, match=rf"scorer '{name}' cannot be loaded from '.*nowhere' .*pass the path"):
        load_scorer(name, str(tmp_path / "nowhere"))


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_random_ones(checkpoints: Path, tmp_path: Path) -> None:
    for file in (checkpoints / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SliderEditError, match=r"not a CLIPModel: 1 weights are missing, such as visual_projection\.weight"):
        load_scorer("clip", str(tmp_path))
    with pytest.raises(SliderEditError, match="scorer 'siglip' cannot be loaded"):
        load_scorer("siglip", str(checkpoints / "clip"))


class _Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_in_place_of_weights_is_not_run(
    checkpoints: Path, lpips_or_none: types.ModuleType | None, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in (checkpoints / "dinov2").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    sources = {"dinov2": folder} | ({"lpips-alex": folder / "pytorch_model.bin"} if lpips_or_none else {})
    for name, source in sources.items():
        with pytest.raises(SliderEditError, match="cannot be loaded"):
            load_scorer(name, str(source))
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def lpips_or_none(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("lpips_package") if find_spec("lpips") else None

"""Inspection of diffusers checkpoints by their configurations and safetensors headers, without loading any weights."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import json
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import is_plain_name, read_json, sha256
from slideredit_rt.quantization.config import QuantizedLayer, read_layers, refusal
from slideredit_rt.quantization.linear import QuantizedLinear, quantize_linears
from slideredit_rt.tensor_files import LFS_HINT, LFS_POINTER, Stored, read_header, take_rows

INDEX_FILE = "model_index.json"
CONFIG_FILE = "config.json"
SLICES = "slices"
"""Key in an imported model's index of shards: for each tensor that is rows of another one in its shard, that one's name as
`tensor` and, as `rows`, the first row and the row after the last."""
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
# All files besides the weights that diffusers and transformers read from a component's folder.
_SETTINGS = (
    *("*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.tokenizer"),
    *("merges.txt", "vocab.txt", "dict.txt"),
)
# Any tokenizer trained on English knows some of these words.
_WORDS = "make the image red and keep a small blue circle in it"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the progress bars and warnings of diffusers and transformers.

    Commands show their own progress bars, and report problems with a model as a `SliderEditError`.
    """
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (was_shown, verbosity) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if was_shown:
                library.enable_progress_bar()


def weight_files(source: Path, library: str) -> list[Path]:
    """Return the files that a library loads a model's weights from; empty if the folder has no weights.

    If a folder has both a single file and an index of shards, diffusers reads the shards and transformers the single file.
    Neither reads a variant (`….fp16.safetensors`) unless asked to.

    Args:
        source: Folder of the model.
        library: `diffusers` or `transformers`.

    Raises:
        SliderEditError: The index of shards is damaged.
    """
    single = source / _WEIGHTS[library]
    index = source / f"{single.name}.index.json"
    if not index.exists() or (library == "transformers" and single.exists()):
        return [single] if single.exists() else []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if odd := [name for name in names if not is_plain_name(name)]:
            # Links are created under these names, so they must stay inside the folder.
            raise ValueError(f"it lists a shard {odd[0]!r}, which is not a plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_index(index, error) from error
    return [index, *(source / name for name in names)]


def _bad_index(index: Path, reason: object) -> SliderEditError:
    return SliderEditError(f"{str(index)!r} is not an index of shards ({reason}); download the checkpoint again")


def read_weights(source: Path, library: str = "diffusers") -> dict[str, Stored]:
    """Return every tensor that a library would load from a model's folder, by name. Only headers are read.

    Args:
        source: Folder of the model.
        library: `diffusers` or `transformers`.

    Raises:
        SliderEditError: The folder has no weights stored as safetensors, or a file is damaged.
    """
    files = weight_files(source, library)
    if not files:
        stem = _WEIGHTS[library].removesuffix(".safetensors")
        variants = sorted(file.name for file in source.glob(f"{stem}.*.safetensors*"))
        found = f", only the variant {variants[0]} (save it without a variant)" if variants else ""
        raise SliderEditError(
            f"{str(source)!r} has neither {_WEIGHTS[library]} nor its index{found}; "
            "pass a diffusers checkpoint stored as safetensors"
        )
    headers = {file.name: read_header(file)[0] for file in files if file.suffix != ".json"}
    if files[0].suffix == ".json" and SLICES in (index := read_json(files[0])):
        return _sliced(files[0], index, headers)
    stored: dict[str, Stored] = {}
    for header in headers.values():
        stored |= header
    return stored


def _sliced(file: Path, index: Mapping[str, Any], headers: Mapping[str, Mapping[str, Stored]]) -> dict[str, Stored]:
    """Return the tensors of an imported model, some of which are rows of tensors with other names."""
    try:
        found = {name: headers[shard].get(name) for name, shard in index["weight_map"].items()}
        for name, entry in index[SLICES].items():
            first, last = map(operator.index, entry["rows"])
            found[name] = take_rows(headers[index["weight_map"][name]][entry["tensor"]], first, last)
        if lacking := [name for name, place in found.items() if place is None]:
            raise ValueError(f"its shards lack {lacking[0]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_index(file, error) from error
    return {name: place for name, place in found.items() if place is not None}


def check_not_quantised(source: Path) -> None:
    """Raise a `SliderEditError` if a model's configuration says that its weights are quantised, by whatever method."""
    try:
        quantisation = read_json(source / CONFIG_FILE).get("quantization_config")
    except (OSError, ValueError):
        return  # an unreadable configuration is reported when the model is built
    if quantisation:
        raise refusal(source, quantisation)


def check_complete(state: Mapping[str, Tensor], stored: Mapping[str, Stored], source: Path) -> None:
    """Check that a model's files hold every tensor of its state dict in the right shape.

    Args:
        state: Tensors that the model needs, by name.
        stored: Tensors in its files, by name.
        source: Folder of the model, for messages.

    Raises:
        SliderEditError: A tensor is missing or has another shape.
    """
    for name, tensor in state.items():
        if name not in stored:
            raise _missing(source, name)
        if stored[name].shape != tuple(tensor.shape):
            raise _mismatched(source, name, stored[name].shape, tensor.shape)


def check_parts(model: Any, stored: Mapping[str, Stored], source: Path) -> None:
    """Check that the files of a model hold the parts of its quantised linears in the dtypes that their precisions have.

    Args:
        model: Model from `meta_transformer` whose files pass `check_complete`.
        stored: Tensors in its files, by name.
        source: Folder of the model, for messages.

    Raises:
        SliderEditError: A part has another dtype.
    """
    for name, module in model.named_modules():
        for part, tensor in module.named_buffers() if isinstance(module, QuantizedLinear) else ():
            if (found := stored[f"{name}.{part}"].dtype) != tensor.dtype:
                raise SliderEditError(
                    f"checkpoint {str(source)!r} stores {name}.{part} as {found}, but {module.precision} needs {tensor.dtype}; "
                    "quantise the original checkpoint again"
                )


def _missing(source: Path, name: str) -> SliderEditError:
    return SliderEditError(f"checkpoint {str(source)!r} lacks the tensor {name}; download it again")


def _mismatched(source: Path, name: str, stored: Collection[int], wanted: Collection[int]) -> SliderEditError:
    return SliderEditError(
        f"checkpoint {str(source)!r} stores {name} with shape {list(stored)}, but its configuration expects {list(wanted)}; "
        "download it again"
    )


def meta_transformer(source: Path, layers: Mapping[str, QuantizedLayer] | None = None) -> Any:
    """Build the transformer that the `config.json` in `source` describes, on the `meta` device (without weights).

    Its quantised linears are `QuantizedLinear` modules.

    Args:
        source: Folder of the model.
        layers: Format of the quantised linears, by name; None reads it from the configuration.

    Raises:
        SliderEditError: The configuration is missing, does not describe a diffusers model, or was quantised in a way that
            cannot be read.
    """
    path = source / CONFIG_FILE
    try:
        config = read_json(path)
        layers = read_layers(source) if layers is None else layers
        config.pop("quantization_config", None)
        model = meta_model(config["_class_name"], config)
        quantize_linears(model, layers)
        return model
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SliderEditError(
            f"cannot build the model that {str(path)!r} describes ({error}); download the checkpoint again"
        ) from error


def meta_model(class_name: str, config: Mapping[str, Any]) -> Any:
    """Build a diffusers model from its configuration, on the `meta` device (without weights).

    Raises:
        TypeError: The class is not a model.
    """
    model_class = getattr(diffusers, class_name)
    if not issubclass(model_class, diffusers.ModelMixin):
        raise TypeError(f"{class_name} is not a model")
    with init_empty_weights():
        return model_class.from_config(dict(config)).eval()


def read_index(base: Path) -> dict[str, Any]:
    """Read the `model_index.json` of a diffusers checkpoint.

    Returns:
        The pipeline's `_class_name` and, by name, each component's library and class.

    Raises:
        SliderEditError: The folder does not exist or is not a checkpoint.
    """
    index = base / INDEX_FILE
    if base.is_file():
        raise refusal(base, None)
    try:
        data = read_json(index)
        if not isinstance(data["_class_name"], str):
            raise ValueError(f"its class is {data['_class_name']!r}")
        return data
    except FileNotFoundError:
        what = "is not a diffusers checkpoint: model_index.json is missing" if base.exists() else "does not exist"
        raise SliderEditError(
            f"base {str(base)!r} {what}; pass a folder saved with save_pretrained, or portraits-kontext"
        ) from None
    except (OSError, KeyError, ValueError) as error:
        raise SliderEditError(
            f"{str(index)!r} is not a diffusers model index ({error}); download the checkpoint again"
        ) from None


def components(base: Path) -> dict[str, tuple[str, str]]:
    """Return the library and class of each component in a checkpoint's `model_index.json`, by name.

    Raises:
        SliderEditError: An entry does not name a class of diffusers or transformers, or its name is not a plain folder name.
    """
    found = {}
    for name, entry in read_index(base).items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not is_plain_name(name) or len(entry) != 2 or entry[0] not in _LIBRARIES or not isinstance(entry[1], str):
            raise SliderEditError(
                f"base {str(base)!r} describes its {name} as {entry}, but a class of diffusers or transformers is expected; "
                "pass a folder saved with save_pretrained"
            )
        found[name] = (entry[0], entry[1])
    return found


def check_pipeline(base: Path, *, skip: Collection[str] = (), classes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check that every component of a checkpoint can be loaded, without reading any weights.

    Models are built on the `meta` device and compared with the names and shapes in their safetensors headers. Tokenizers must
    know some English words.

    Args:
        base: Folder of a diffusers pipeline.
        skip: Components that are not needed.
        classes: Replacements for classes in `model_index.json`, by component.

    Returns:
        The loaded components that are not models (schedulers, tokenizers, processors), by name.

    Raises:
        SliderEditError: A component is missing, damaged, quantised or not stored as safetensors.
    """
    pipeline_class = getattr(diffusers, read_index(base)["_class_name"])
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    described, loaded = components(base), {}
    # Parameters with other defaults, such as `is_distilled`, are settings.
    for name in (p.name for p in parameters if p.name not in skip and p.default in (p.empty, None)):
        if name not in described:
            if name in pipeline_class._optional_components:
                continue
            raise SliderEditError(f"base {str(base)!r} has no {name} in its model_index.json; download the checkpoint again")
        library, class_name = described[name]
        component_class = (classes or {}).get(name) or getattr(_LIBRARIES[library], class_name, None)
        if component_class is None:
            raise SliderEditError(
                f"base {str(base)!r} needs a {class_name} as its {name}, which the installed {library} "
                f"{_LIBRARIES[library].__version__} does not have; install another version of {library}"
            )
        with quiet_libraries():
            component = _check_component(base / name, library, component_class)
        if component is not None:
            loaded[name] = component
    return loaded


def _check_component(folder: Path, library: str, component_class: Any) -> Any:
    """Check one component. Return it loaded, or None if it is a model."""
    if not folder.is_dir():
        raise SliderEditError(f"base {str(folder.parent)!r} lacks the folder {folder.name}; download the checkpoint again")
    for file in component_files(folder, library):
        if file.exists() and file.open("rb").read(len(LFS_POINTER)) == LFS_POINTER:
            raise SliderEditError(f"cannot read {str(file)!r}: {LFS_HINT}")
    if issubclass(component_class, diffusers.ModelMixin):
        # Before the weights: other methods store them under other names or in other files.
        read_layers(folder)
        stored, model = read_weights(folder), meta_transformer(folder)
        # Old autoencoders store their attention blocks under other names. Diffusers only uses the names here.
        model._fix_state_dict_keys_on_load(stored)
        check_complete(model.state_dict(), stored, folder)
        check_parts(model, stored, folder)
        return None
    if issubclass(component_class, transformers.PreTrainedModel):
        check_not_quantised(folder)
        _check_encoder(folder, component_class)
        return None
    component = load_components(folder, lambda: component_class.from_pretrained(folder, local_files_only=True))
    tokenizer = getattr(component, "tokenizer", component)
    if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        _check_tokenizer(tokenizer, folder)
    return component


def load_components(folder: Path, load: Callable[[], Any]) -> Any:
    """Load a pipeline or a component with a library, and turn any exception into a `SliderEditError`.

    Args:
        folder: Folder of the pipeline or component, for messages.
        load: Function that loads it.
    """
    try:
        return load()
    except Exception as error:  # the libraries raise many unrelated classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SliderEditError(f"cannot load {str(folder)!r} of the base ({reason}); download the checkpoint again") from error


def _check_encoder(folder: Path, model_class: Any) -> None:
    """Compare a transformers model with its files; transformers itself maps the stored names to its own."""
    stored = read_weights(folder, "transformers")
    state = {name: torch.empty(place.shape, dtype=place.dtype, device="meta") for name, place in stored.items()}

    def load() -> Any:
        read_json(folder / CONFIG_FILE)  # transformers would silently use its defaults if the file is missing
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        return model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )

    _, report = load_components(folder, load)
    # Transformers would initialise both kinds at random.
    for name in sorted(report["missing_keys"]):
        raise _missing(folder, name)
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise _mismatched(folder, name, found, wanted)


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Check that a tokenizer has its files and knows words: without a vocabulary, transformers loads an empty tokenizer."""
    vocabulary = {name for part, name in tokenizer.vocab_files_names.items() if part != "tokenizer_file"}
    lacking = [] if (folder / "tokenizer.json").exists() else [n for n in sorted(vocabulary) if not (folder / n).exists()]
    lacking += [name for name in ("tokenizer_config.json",) if not (folder / name).exists()]
    if lacking:
        raise SliderEditError(
            f"the base's tokenizer {str(folder)!r} lacks {' and '.join(lacking)}; download the checkpoint again"
        )
    encoded = load_components(
        folder, lambda: tokenizer(_WORDS, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    )
    known = [
        number
        for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if start < end and number != tokenizer.unk_token_id
    ]
    if not known:
        raise SliderEditError(
            f"the base's tokenizer {str(folder)!r} knows none of the words {_WORDS!r}; download the checkpoint again"
        )


def component_files(folder: Path, library: str) -> list[Path]:
    """Return the files that are read when a component is loaded: settings, vocabulary, templates and the weights in use.

    Hidden files, notes, other formats of the weights and variants are left out, so they may change freely.

    Args:
        folder: Folder of the component.
        library: `diffusers` or `transformers`.

    Returns:
        The files, sorted.
    """
    settings = [
        file
        for file in folder.rglob("*")
        if file.is_file()
        and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _SETTINGS)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    # Transformers merges an adapter that is stored beside a model into the model.
    adapter = folder / "adapter_model.safetensors"
    found = {*settings, *weight_files(folder, library), *([adapter] if adapter.exists() else [])}
    return sorted(found)


def fingerprint_base(base: Path, *, skip: Collection[str] = (), digest: Callable[[Path], str] = sha256) -> dict[str, str]:
    """Compute the SHA-256 of each component of a diffusers checkpoint, over the names and contents of its `component_files`.

    The classes of the pipeline and its components are hashed as one more entry, named `model_index.json`.

    Args:
        base: Folder of a diffusers pipeline.
        skip: Components to leave out.
        digest: Function that returns a file's SHA-256.

    Returns:
        The digests in hexadecimal, by component.

    Raises:
        SliderEditError: The folder is not a checkpoint, or a file cannot be read.
    """
    index = {name: value for name, value in read_index(base).items() if name == "_class_name" or not name.startswith("_")}
    found = {INDEX_FILE: hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()}
    for name, (library, _) in components(base).items():
        if name in skip:
            continue
        folder, lines = base / name, []
        for file in component_files(folder, library):
            try:
                lines.append(f"{file.relative_to(folder).as_posix()}\0{digest(file)}\n")
            except OSError as error:
                raise SliderEditError(f"cannot read {str(file)!r} of the base ({error.strerror or error})") from error
        found[name] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return found

"""The embedded editors and their adapters, and how a base or an adapter is found by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import user_path

_HERE = Path(__file__).parent
WORLDS = ("portraits", "shapes")
DEFAULT_WORLD = WORLDS[0]
"""World whose editor is served, shown and trained unless another one is named."""


def base_of(world: str) -> str:
    """Return the name of the editor of a world."""
    return f"{world}-kontext"


def _shipped(parts: tuple[str, ...], suffix: str = "") -> dict[str, Path]:
    """Return the files or folders of these parts that the worlds have in this package, by name."""
    names = [f"{world}-{part}" for world in WORLDS for part in parts]
    return {name: _HERE / f"{name}{suffix}" for name in names if (_HERE / f"{name}{suffix}").exists()}


_BASES = _shipped(("kontext",))
_ADAPTERS = _shipped(("st", "gst", "concepts", "turbo"), ".safetensors")
_OFFSETS = _shipped(("offsets",), ".safetensors")
_EDITOR, _ADAPTER, _OFFSET_FILE = "an editor", "an adapter", "a file of attribute offsets"
_KINDS = {_EDITOR: _BASES, _ADAPTER: _ADAPTERS, _OFFSET_FILE: _OFFSETS}


def _embedded(text: str, wanted: str) -> Path | None:
    """Return the location of an embedded name, or None if it is not one.

    Raises:
        SliderEditError: The name is of something other than what is wanted.
    """
    kind = next((kind for kind, names in _KINDS.items() if text in names), None)
    if kind not in (None, wanted):
        raise SliderEditError(f"{text!r} is {kind}, not {wanted}; pass a path or one of {', '.join(_KINDS[wanted])}")
    return _KINDS[wanted].get(text)


def is_embedded(name: str) -> bool:
    """Return whether this is the name of an editor in this package."""
    return name in _BASES


def world_of(source: str | Path) -> str | None:
    """Return the world of an embedded editor or adapter, given its name or location; None for any other source."""
    shipped = {name: path for names in _KINDS.values() for name, path in names.items()}
    names = (name for name, path in shipped.items() if str(source) == name or Path(source) == path)
    return next((name.partition("-")[0] for name in names), None)


def choose_world(given: str | None, sources: Sequence[str | Path | None]) -> str:
    """Return the world that was given, else that of the first embedded source, else the default one.

    Args:
        given: World that was asked for, None for any.
        sources: Bases and adapters, by name or location. Those that are None or not embedded count nothing.

    Raises:
        SliderEditError: An embedded source belongs to another world.
    """
    known = {str(source): world for source in sources if source is not None and (world := world_of(source)) is not None}
    chosen = given or next(iter(known.values()), DEFAULT_WORLD)
    for source, world in known.items():
        if world != chosen:
            raise SliderEditError(f"{source!r} belongs to the world {world!r}, not to {chosen!r}; use one world for everything")
    return chosen


def resolve_base(source: str | Path) -> Path:
    """Folder of a base checkpoint: an embedded name, a local folder, or a repository on the Hugging Face hub.

    Raises:
        SliderEditError: Nothing of that name can be found, or the name is that of an embedded adapter or offsets.
    """
    text = str(source)
    if (found := _embedded(text, _EDITOR)) is not None:
        return found
    path = user_path(text)
    return _download(text, path, f"base {text!r}", f"a folder saved with save_pretrained, or one of {', '.join(_BASES)}")


def resolve_decoder(source: str | Path) -> Path:
    """Folder of a tiny autoencoder: a local folder, or a repository on the Hugging Face hub.

    Raises:
        SliderEditError: Nothing of that name can be found.
    """
    text = str(source)
    return _download(text, user_path(text), f"preview decoder {text!r}", "the folder of an AutoencoderTiny")


def _download(text: str, path: Path, what: str, instead: str) -> Path:
    """Return the folder of what was given: `path` if it exists or `text` is not a repository, else a download.

    Args:
        text: Local path or name of a repository.
        path: Local path.
        what: Description of what was given, for the error.
        instead: Description of what to give instead, for the error.
    """
    looks_like_repository = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if path.exists() or not looks_like_repository:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, ignore_patterns=["*.bin", "*.pt", "*.ckpt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SliderEditError(
            f"{what} is neither a folder here nor a repository that can be downloaded ({reason}); give {instead}"
        ) from None


def from_anywhere(source: str | Path) -> str:
    """Return a source that can be found from any working folder: existing paths become absolute, names stay."""
    text, path = str(source), user_path(source)
    return str(path.resolve()) if text not in _BASES | _ADAPTERS and path.exists() else text


def resolve_adapter(source: str | Path) -> Path:
    """File or folder of an adapter: an embedded name or a local path.

    Raises:
        SliderEditError: The name is that of an embedded editor or of attribute offsets.
    """
    return _embedded(str(source), _ADAPTER) or user_path(source)


def resolve_offsets(source: str | Path) -> Path:
    """File of attribute offsets: an embedded name or a local path.

    Raises:
        SliderEditError: The name is that of an embedded editor or adapter.
    """
    return _embedded(str(source), _OFFSET_FILE) or user_path(source)

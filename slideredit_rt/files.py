"""Paths that people write, files and folders that are written whole or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slideredit_rt.errors import SliderEditError

_MAX_DEPTH = 64
_MAX_JSON = 64 * 2**20  # bytes; the index of a model of a hundred thousand tensors has a tenth of it
# Below this, hashing a file again costs no more than looking up what it was.
_REMEMBERED = 2**20
_MOST_REMEMBERED = 4096


def user_path(text: str | Path) -> Path:
    """A path as people write it, with `~` expanded; a `~` that names nobody stays as it is."""
    return Path(os.path.expanduser(text))


def is_plain_name(name: Any) -> bool:
    """Whether `name` is a file's name and leads nowhere else."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name and not set(name) & {"\\", "\0"}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else: no text, no JSON, another type, a number that is not finite, or too much nesting.
    """

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"it holds {text[:20]}")
        return number

    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        raw = file.read(_MAX_JSON + 1)
    if len(raw) > _MAX_JSON:
        raise ValueError(f"it is larger than {_MAX_JSON // 2**20} MiB")
    try:
        data = json.loads(raw, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError("it holds no object")
    level: list[Any] = [data]
    for _ in range(_MAX_DEPTH):
        below = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = list(itertools.chain.from_iterable(below))
        if not level:
            return data
    raise ValueError("it is nested too deep")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders of earlier writers of `path` that were killed before they could."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            continue


def cache_directory() -> Path:
    """Return the user's cache of this program: `$XDG_CACHE_HOME/slideredit-rt`, by default below `~/.cache`.

    A user without a home, as containers have, gets one below the folder for temporary files.
    """
    home = os.path.expanduser("~")
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir() if home == "~" else home, ".cache"))
        / "slideredit-rt"
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it into place if the block succeeds, remove it if not."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise SliderEditError(f"cannot write {str(path)!r}: {error.strerror or error}; nothing was left behind") from error
    finally:
        with suppress(OSError):  # of a folder that does not exist; what kept the file from being written is the news
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place if the block succeeds, remove it if not."""
    if path.exists() and not overwrite:
        raise SliderEditError(f"{str(path)!r} exists already; choose another name or pass --overwrite")
    temporary = _temporary(path)
    _remove_leftovers(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            # The old folder moves aside first: a reader sees the old one or the new one, never a mixture.
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise SliderEditError(f"cannot write {str(path)!r}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """SHA-256 of files, remembered in a file of its own so that gigabytes are read once and not each time.

    A digest holds while inode, size and the times of the last change to content and to metadata stay the same. Nobody can set
    the last of these: a file that was overwritten in place, whatever its modification time says now, is read again. So is one
    that was only copied, moved to another file system, linked or given other permissions.

    Args:
        path: where digests are remembered, in the user's cache if it cannot be written; a file that cannot be read is one
            without entries.
    """

    def __init__(self, path: Path) -> None:
        name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        self._places = (path, cache_directory() / "digests" / f"{name}.json")
        self._known: dict[str, str] = {}
        self._changed = False
        for place in self._places:
            with suppress(OSError, ValueError):
                self._known |= {key: value for key, value in read_json(place).items() if isinstance(value, str)}

    def __call__(self, file: Path) -> str:
        """SHA-256 of `file`, in hexadecimal."""
        status = file.stat()
        if status.st_size < _REMEMBERED:
            return sha256(file)
        # The times of before the file is read: a change meanwhile makes the entry one of a state that no longer is.
        key, times = f"{status.st_ino} {status.st_size}", f"{status.st_mtime_ns} {status.st_ctime_ns}"
        *before, digest = self._known.get(key, "").rsplit(" ", 1)
        if before != [times]:
            digest = sha256(file)
            self._known[key] = f"{times} {digest}"
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learned; where nothing can be written, files are read again next time."""
        if self._changed:
            text = json.dumps(dict(list(self._known.items())[-_MOST_REMEMBERED:]))
            any(_written(place, text) for place in self._places)
            self._changed = False


def _written(path: Path, text: str) -> bool:
    """Write a text file; whether that was possible."""
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    except SliderEditError:
        return False
    return True


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of the files in a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()

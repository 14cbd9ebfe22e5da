"""User paths, JSON files, atomic writing of files and folders, and fingerprints."""

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
_MAX_JSON = 64 * 2**20  # bytes; the index of a model with a hundred thousand tensors takes a tenth of this
# Hashing a file smaller than this is as fast as looking up its digest.
_REMEMBERED = 2**20
_MOST_REMEMBERED = 4096


MANIFEST = "manifest.json"
"""Name of the file that describes an engine folder."""


def user_path(text: str | Path) -> Path:
    """Return a path with `~` expanded. A `~` that names no user is kept as it is."""
    return Path(os.path.expanduser(text))


def is_plain_name(name: Any) -> bool:
    """Return whether `name` is the name of a file or folder, without any path."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name and not set(name) & {"\\", "\0"}


def check_engine_folder(folder: Path) -> None:
    """Check that a folder has a manifest. Commands do so ahead of imports that take seconds.

    Raises:
        SliderEditError: The folder or the manifest does not exist.
    """
    try:
        os.stat(folder / MANIFEST)
    except FileNotFoundError:
        what = f"is not an engine folder: {MANIFEST} is missing" if folder.exists() else "does not exist"
        raise SliderEditError(f"engine {str(folder)!r} {what}; build one with slideredit-rt build") from None
    except OSError:
        # Reading the manifest will say why that fails.
        return


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The content is not JSON, not an object, nested too deeply, or has a number that is not finite.
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
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    level: list[Any] = [data]
    for _ in range(_MAX_DEPTH):
        below = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = list(itertools.chain.from_iterable(below))
        if not level:
            return data
    raise ValueError("it is nested too deeply")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary folders of earlier writers of `path` that were killed before they could do so."""
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

    Without a home directory, as in some containers, it is below the folder for temporary files.
    """
    home = os.path.expanduser("~")
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir() if home == "~" else home, ".cache"))
        / "slideredit-rt"
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place if the block succeeds, remove it if not."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise SliderEditError(f"cannot write {str(path)!r}: {error.strerror or error}; nothing was left behind") from error
    finally:
        with suppress(OSError):  # the folder may not exist; the error that kept the file from being written matters more
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place if the block succeeds, remove it if not.

    Args:
        path: Folder to write.
        overwrite: Replace a folder that exists.

    Raises:
        SliderEditError: The folder exists and `overwrite` is false, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise SliderEditError(f"{str(path)!r} exists already; choose another name or pass --overwrite")
    temporary = _temporary(path)
    _remove_leftovers(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            # Move the old folder aside first, so that readers see either the old or the new one, never a mixture.
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
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """SHA-256 digests of files, cached on disk so that gigabytes are hashed only once.

    A cached digest is valid while the file's inode, size, mtime and ctime stay the same. The ctime cannot be set by users, so
    a file that was overwritten in place is hashed again even if its mtime was restored. So is a file that was copied, moved to
    another file system, linked or given other permissions.

    Args:
        path: File that keeps the digests; the user's cache is used if it cannot be written. A file that cannot be read counts
            as empty.
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
        """Return the SHA-256 of `file`, in hexadecimal."""
        status = file.stat()
        if status.st_size < _REMEMBERED:
            return sha256(file)
        # Take the times before reading: if the file changes meanwhile, the entry will not match it later.
        key, times = f"{status.st_ino} {status.st_size}", f"{status.st_mtime_ns} {status.st_ctime_ns}"
        *before, digest = self._known.get(key, "").rsplit(" ", 1)
        if before != [times]:
            digest = sha256(file)
            self._known[key] = f"{times} {digest}"
            self._changed = True
        return digest

    def save(self) -> None:
        """Write new digests to disk. If that is not possible, the files are hashed again next time."""
        if self._changed:
            text = json.dumps(dict(list(self._known.items())[-_MOST_REMEMBERED:]))
            any(_written(place, text) for place in self._places)
            self._changed = False


def _written(path: Path, text: str) -> bool:
    """Write a text file; return whether that succeeded."""
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    except SliderEditError:
        return False
    return True


def folder_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of the files in a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()

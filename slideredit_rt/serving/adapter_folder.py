"""`AdapterFolder`: the adapters that requests can choose by name."""

from __future__ import annotations

import os
from pathlib import Path

from slideredit_rt.adapters.reading import FOLDER_FILES
from slideredit_rt.errors import SliderEditError


class AdapterFolder:
    """A folder of adapters: safetensors files, named without their suffix, and PEFT or diffusers folders.

    It is listed again for every request, so adapters can be added while the server runs. Entries that cannot be looked into
    are left out.

    Args:
        folder: Existing folder.

    Raises:
        SliderEditError: The folder does not exist or cannot be read, or two of its adapters have the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in self.names():
            self.path(name)

    def names(self) -> list[str]:
        """Return the names of the adapters, in alphabetical order."""
        return sorted(self._found())

    def path(self, name: str) -> Path:
        """Return the file or folder of an adapter.

        Raises:
            SliderEditError: There is no adapter of that name, or there are two.
        """
        found = self._found()
        if name not in found:
            choice = f"choose from {', '.join(map(repr, sorted(found)))}" if found else "there is none"
            raise SliderEditError(f"the adapter {name[:80]!r} is not served here; {choice}")
        first, *others = found[name]
        if others:
            raise SliderEditError(
                f"the adapter {name[:80]!r} is both {str(first)!r} and {str(others[0])!r}; rename or remove one of them"
            )
        return first

    def _found(self) -> dict[str, list[Path]]:
        """Return the files and folders of each name."""
        try:
            entries = sorted(self.folder.iterdir())
        except OSError as error:
            raise SliderEditError(f"cannot read the adapter folder {str(self.folder)!r} ({error.strerror})") from None
        found: dict[str, list[Path]] = {}
        for entry in entries:
            if entry.suffix == ".safetensors" and _is_file(entry):
                found.setdefault(entry.stem, []).append(entry)
            elif any(_is_file(entry / name) for name in FOLDER_FILES):
                found.setdefault(entry.name, []).append(entry)
        return found


def _is_file(path: Path) -> bool:
    """Return whether a path is a file. `Path.is_file` raises some errors, such as a missing permission, before Python 3.14."""
    return os.path.isfile(path)

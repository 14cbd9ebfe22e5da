"""`AdapterFolder`: the adapters that requests can choose by name."""

from __future__ import annotations

from pathlib import Path

from slideredit_rt.adapters.reading import FOLDER_FILES
from slideredit_rt.errors import SliderEditError


class AdapterFolder:
    """A folder of adapters: safetensors files, named without their suffix, and PEFT or diffusers folders.

    It is listed again for every request, so adapters can be added while the server runs.

    Args:
        folder: Existing folder.

    Raises:
        SliderEditError: The folder does not exist or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found()

    def names(self) -> list[str]:
        """Return the names of the adapters, in alphabetical order."""
        return sorted(self._found())

    def path(self, name: str) -> Path:
        """Return the file or folder of an adapter.

        Raises:
            SliderEditError: There is no adapter of that name.
        """
        found = self._found()
        if name not in found:
            choice = f"choose from {', '.join(map(repr, sorted(found)))}" if found else "there is none"
            raise SliderEditError(f"the adapter {name[:80]!r} is not served here; {choice}")
        return found[name]

    def _found(self) -> dict[str, Path]:
        try:
            entries = sorted(self.folder.iterdir())
        except OSError as error:
            raise SliderEditError(f"cannot read the adapter folder {str(self.folder)!r} ({error.strerror})") from None
        files = {entry.stem: entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()}
        folders = {entry.name: entry for entry in entries if any((entry / name).is_file() for name in FOLDER_FILES)}
        return folders | files

"""`manifest.json`, which describes an engine folder: its files, its origin and its inputs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideredit_rt.adapters import AdapterInputs
from slideredit_rt.adapters.inputs import is_adapter_input
from slideredit_rt.checkpoint import fingerprint_base
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import FAMILIES, KINDS, Kind, TensorSpec
from slideredit_rt.files import MANIFEST, Digests, atomic_file, check_engine_folder, is_plain_name, read_json, sha256
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.settings import EditDefaults
from slideredit_rt.strength import StrengthCurve

SCHEMA_VERSION = 2
NAME = MANIFEST
MODEL_FILE = "model.onnx"
ADAPTER_FILE = "adapter.safetensors"
CONVERTED_FILE = "converted.safetensors"
"""Weights of the base in another dtype or layout than the base's own files have them, or with fused LoRAs."""
DIGESTS = ".digests.json"
"""Cached digests of an engine folder's large files. Not a part of the engine; written again when it is missing."""
MAX_BATCH, MAX_SLIDERS = 1024, 256
"""The largest limits that an engine may have."""
MAX_RANK = 1024
"""The largest rank of adapter inputs."""
MAX_FUSED = 64
"""Most LoRAs that may be fused into an engine."""


@dataclass(frozen=True)
class Manifest:
    """Description of an engine.

    Attributes:
        family: Base-model family.
        base: `source` (embedded name, hub repository or absolute folder) and `fingerprint`, SHA-256 per pipeline component.
        adapter: `source`, `fingerprint`, `kind`, `rank`, `modules`, `strength_curve`, and for a bank `members`, by name, each
            with its `source`, `kind` and `strength_curve`; None for an engine of the frozen backbone. For an engine with
            adapter inputs, its default adapter, if it has one.
        backend: Name of the backend.
        backend_version: Version of its package.
        lowering: Requested form of the masked update: `native`, `folded`, `plugin`, or `operator` (this package's operators,
            run by torch).
        targets: CUDA compute capabilities that it was built for; empty for a CPU engine.
        max_batch: Largest accepted B.
        max_sliders: Largest accepted K.
        config: Configuration of the transformer.
        inputs: Names, dtypes and shapes of the inputs.
        outputs: Names, dtypes and shapes of the outputs.
        files: SHA-256 and size in bytes of each file, by name.
        created: Time of the build, UTC, ISO 8601.
        versions: Versions of the packages that it was built with.
        ranges: Smallest, usual and largest size of each axis in a step, if the backend compiles for a range.
        reading_ranges: The same for a call that reads source images, for a family that reads them once.
        dtype: Dtype of weights, arithmetic, and keys and values of source images, as torch names it. Other floating-point
            inputs and outputs are float32.
        updates: Number of adapted linears by their final lowering.
        layers: Number of layers by type in the compiled network, before the builder fused them.
        compatibility: Environments besides the build's own TensorRT version and GPU that can run a plan: `versions` (bool,
            later ones of the same major) and `hardware` (`none`, `ampere_plus` or `same_compute_capability`).
        weight_streaming: True if weights can be copied from the host in every step (TensorRT's weight streaming).
        links: SHA-256, size and `kind` (`hard` or `symbolic`) of each checkpoint file linked into the folder, by name.
        precision: Name of the precision that the base was quantised to; None for one that was not.
        quantised: Number of quantised linears by their precision.
        plan: Types that a compiled plan computes in, as its builder reported: `gemms`, the number of GEMMs by the types of
            their operands, and `weights`, bytes by type; empty for other engines.
        fused: LoRAs that were added to the base's weights: `source`, `scale`, `fingerprint` and number of `modules` of each
            (see `slideredit_rt.adapters.Updates`).
        defaults: Fields of `EditDefaults` that were set at the build.
        adapter_inputs: Layout of the adapter inputs (see `slideredit_rt.adapters.AdapterInputs`); empty for an engine without
            them.
        schema_version: Version of the manifest's format.
    """

    family: str
    base: dict[str, Any]
    adapter: dict[str, Any] | None
    backend: str
    backend_version: str
    lowering: str
    targets: list[str]
    max_batch: int
    max_sliders: int
    config: dict[str, Any]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    files: dict[str, dict[str, Any]]
    created: str
    versions: dict[str, str]
    ranges: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    reading_ranges: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    updates: dict[str, int] = dataclasses.field(default_factory=dict)
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    compatibility: dict[str, Any] = dataclasses.field(default_factory=dict)
    links: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    weight_streaming: bool = False
    precision: str | None = None
    quantised: dict[str, int] = dataclasses.field(default_factory=dict)
    plan: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    fused: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter_inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def kind(self) -> str | None:
        return (self.adapter or self.adapter_inputs).get("kind")

    @property
    def layout(self) -> AdapterInputs | None:
        """Layout of the adapter inputs; None for an engine without them."""
        return AdapterInputs.from_json(self.adapter_inputs) if self.adapter_inputs else None

    @property
    def curve(self) -> StrengthCurve:
        """The adapter's curve from strength to alpha."""
        return StrengthCurve.from_json(self.adapter and self.adapter.get("strength_curve"))

    @property
    def members(self) -> dict[str, StrengthCurve]:
        """Strength curves of a bank's members, in the order of the last axis of `alpha`; empty without a bank."""
        described = (self.adapter or {}).get("members", {})
        return {name: StrengthCurve.from_json(member["strength_curve"]) for name, member in described.items()}

    @property
    def member_kinds(self) -> dict[str, Kind]:
        """Kinds of a bank's members, by name; empty without a bank."""
        described = (self.adapter or {}).get("members", {})
        return {name: member.get("kind", self.kind) for name, member in described.items()}

    @property
    def min_batch(self) -> int:
        """Smallest accepted B: 1, unless the engine was compiled for a range that begins above it."""
        return self.ranges.get("batch", [1])[0]

    @property
    def edit_defaults(self) -> EditDefaults:
        """Values of settings that an edit does not set."""
        return EditDefaults(**self.defaults)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_base(manifest: Manifest, engine: Path, base: Path, *, skip: Collection[str] = ()) -> None:
    """Check that a base is the one that an engine was built from.

    Args:
        manifest: Manifest of the engine.
        engine: Folder of the engine, where digests of large files are cached.
        base: Folder of a diffusers checkpoint.
        skip: Components that are not compared.

    Raises:
        SliderEditError: It is another base, or it was changed after the build.
    """
    digests = Digests(engine / DIGESTS)
    actual = fingerprint_base(base, skip=skip, digest=digests)
    digests.save()
    expected = {name: value for name, value in manifest.base["fingerprint"].items() if name not in skip}
    if changed := sorted(name for name in expected if actual.get(name) != expected[name]):
        raise SliderEditError(
            f"base {str(base)!r} is not the one that engine {str(engine)!r} was built from: {', '.join(changed)} differ; "
            "pass the original base or rebuild the engine"
        )


def describe_files(folder: Path, names: list[str], digest: Callable[[Path], str] = sha256) -> dict[str, dict[str, Any]]:
    """Return the SHA-256 and size in bytes of files in an engine folder, by name."""
    return {name: {"sha256": digest(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest atomically. Call it last, after all files that it describes have been written."""
    with atomic_file(folder / NAME) as temporary:
        temporary.write_text(json.dumps(manifest.to_json(), indent=2) + "\n")


def read_manifest(folder: Path, *, unchecked: str | None = None) -> Manifest:
    """Read a manifest and check that all files that it lists exist and are unchanged.

    Digests of large files are cached in the folder, so a file is hashed again only after it was changed
    (see `slideredit_rt.files.Digests`). Links are followed, and their targets must have the recorded content.

    Args:
        folder: Engine folder.
        unchecked: Name of a file that is not checked, because the caller will overwrite it.

    Raises:
        SliderEditError: The folder is not an engine, its schema version is not supported, the manifest is invalid, or a file
            is missing, truncated or changed.
    """
    check_engine_folder(folder)
    path = folder / NAME
    try:
        data = read_json(path)
        version = data["schema_version"]
        if version == SCHEMA_VERSION:
            manifest = _parse(data)
    except (ValueError, KeyError, OSError) as error:
        raise SliderEditError(f"{str(path)!r} is damaged ({error}); build the engine again") from None
    if version != SCHEMA_VERSION:
        raise SliderEditError(
            f"engine {str(folder)!r} has manifest schema {version!r:.40}, but this version reads {SCHEMA_VERSION}; "
            "build the engine again"
        )
    digests = Digests(folder / DIGESTS)
    for name, expected in (manifest.files | manifest.links).items():
        if name != unchecked:
            _check_file(folder, name, expected, digests, linked=name in manifest.links, source=manifest.base["source"])
    digests.save()
    return manifest


def _check_file(folder: Path, name: str, expected: Mapping[str, Any], digests: Digests, *, linked: bool, source: str) -> None:
    file = folder / name
    try:
        # Only regular files are read: a pipe, for example, might never end.
        size = file.stat().st_size if file.is_file() else None
        whole = size == expected["bytes"] and digests(file) == expected["sha256"]
    except OSError as error:
        raise SliderEditError(f"engine file {str(file)!r} cannot be read ({error.strerror or error})") from error
    if whole:
        return
    if linked:
        raise SliderEditError(
            f"engine {str(folder)!r} links to the checkpoint's file {name}, which is missing or was changed after the build; "
            f"restore it in {source!r} and build the engine again, with --copy-weights if the checkpoint may change"
        )
    if size is None:
        raise SliderEditError(f"engine {str(folder)!r} lacks the file {name}; build the engine again")
    if size != expected["bytes"]:
        raise SliderEditError(
            f"engine file {str(file)!r} has {size} bytes instead of {expected['bytes']}; build the engine again"
        )
    raise SliderEditError(f"engine file {str(file)!r} was changed after the build; build the engine again")


# --- Validation of manifests, which may come from an untrusted source ---------------------------------------------------

# Takes a value and its location, and raises a ValueError if the value is not valid there.
_Check = Callable[[Any, str], None]
_MOST = 4096  # most entries of any list or mapping
_LARGEST = 2**31  # largest size, count or number in the configuration


def _refuse(where: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{where} is {value!r:.60}, expected {expected}")


def _text(value: Any, where: str) -> None:
    # Control characters could send escape sequences to the terminal of a user who inspects the engine. Lone surrogates cannot
    # be encoded, except those that stand for undecodable bytes of a path (U+DC80 to U+DCFF).
    if not isinstance(value, str) or len(value) > _MOST or re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]", value):
        raise _refuse(where, value, "a line of text")


def _file_name(value: Any, where: str) -> None:
    _text(value, where)
    if not is_plain_name(value) or len(value) > 255:
        raise _refuse(where, value, "a plain file name")


def _sha256(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise _refuse(where, value, "a SHA-256 in hexadecimal")


def _whole(low: int, high: int) -> _Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _refuse(where, value, f"a whole number from {low} to {high}")

    return check


def _number(low: float, high: float) -> _Check:
    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise _refuse(where, value, f"a number from {low:g} to {high:g}")

    return check


def _one_of(*known: Any) -> _Check:
    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(one) and value == one for one in known):
            raise _refuse(where, value, f"one of {', '.join(map(repr, known))}")

    return check


def _either(one: _Check, other: _Check) -> _Check:
    """Combine two checks, of which one must pass."""

    def check(value: Any, where: str) -> None:
        try:
            one(value, where)
        except ValueError:
            other(value, where)

    return check


def _list(item: _Check, fewest: int = 0, most: int = _MOST) -> _Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            raise _refuse(where, value, f"a list of {fewest} to {most}")
        for index, one in enumerate(value):
            item(one, f"{where}[{index}]")

    return check


def _mapping(item: _Check, key: _Check = _text, most: int = _MOST) -> _Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise _refuse(where, value, f"an object of at most {most} entries")
        for name, one in value.items():
            key(name, f"a name in {where}")
            item(one, f"{where}.{name}")

    return check


def _record(needed: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None) -> _Check:
    known = {**needed, **(optional or {})}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refuse(where, value, "an object")
        if lacking := [name for name in needed if name not in value]:
            raise ValueError(f"{where} has no {lacking[0]}")
        for name, one in value.items():
            if name not in known:
                raise ValueError(f"{where} has the unknown entry {name!r:.60}")
            known[name](one, f"{where}.{name}")

    return check


def _plain(value: Any, where: str, depth: int = 8) -> None:
    """Check that a model's configuration or an adapter's training record is JSON of reasonable size."""
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError(f"{where} is nested too deeply")
        entries = value.values() if isinstance(value, dict) else value
        if len(entries) > _MOST:
            raise _refuse(where, value, f"at most {_MOST} entries")
        for one in entries:
            _plain(one, where, depth - 1)
    elif isinstance(value, int | float) and abs(value) > _LARGEST:
        raise _refuse(where, value, f"numbers up to {_LARGEST}")


def _curve(value: Any, where: str) -> None:
    _plain(value, where)
    try:
        StrengthCurve.from_json(value)
    except SliderEditError:
        raise _refuse(where, value, "a strength curve") from None


def _rising(value: Any, where: str) -> None:
    _list(_whole(0, _LARGEST), 3, 3)(value, where)
    if value != sorted(value):
        raise _refuse(where, value, "three numbers in ascending order")


def _defaults(value: Any, where: str) -> None:
    scale = _number(-_LARGEST, _LARGEST)
    numbers = {"guidance_scale": scale, "true_cfg_scale": scale, "timestep_shift": scale, "slider_start": scale}
    _record({}, {"steps": _whole(1, _LARGEST), **numbers})(value, where)
    try:
        EditDefaults(**value)
    except SliderEditError:
        raise _refuse(where, value, "defaults of an edit") from None


_COUNTS = _mapping(_whole(0, _LARGEST))
_AXES = ("batch", "text_rows", "image_rows", "sliders", "rows", "references", "reference_rows", "kept_rows")
_SPECS = _list(
    _record(
        {
            "name": _text,
            "dtype": _one_of("float32", "bfloat16", "float16", "bool", "int64"),
            "shape": _list(_either(_one_of(*_AXES), _whole(1, _LARGEST)), 1, 8),
        }
    ),
    1,
    64,
)
_BYTES = _whole(0, 2**50)
_FILE = {"sha256": _sha256, "bytes": _BYTES}
_ADAPTER = _record(
    {
        "source": _text,
        "fingerprint": _text,
        "kind": _one_of(*KINDS),
        "rank": _whole(1, _LARGEST),
        "modules": _whole(1, _LARGEST),
        "strength_curve": _curve,
    },
    {
        "training": _plain,
        "members": _mapping(_record({"source": _text, "strength_curve": _curve}, {"kind": _one_of(*KINDS)}), most=MAX_SLIDERS),
        "dropped": _list(_text, most=_LARGEST),
    },
)
_FUSED = _record(
    {"source": _text, "scale": _number(-_LARGEST, _LARGEST), "fingerprint": _sha256, "modules": _whole(1, _LARGEST)}
)
_LAYOUT = _record(
    {
        "kind": _one_of(*KINDS),
        "max_rank": _whole(1, MAX_RANK),
        "modules": _mapping(_list(_whole(1, _LARGEST), 2, 2)),
    }
)
_MANIFEST = _record(
    {
        "family": _text,
        "base": _record({"source": _text, "fingerprint": _mapping(_sha256)}),
        "adapter": _either(_one_of(None), _ADAPTER),
        "backend": _text,
        "backend_version": _text,
        "lowering": _text,
        "targets": _list(_text),
        "max_batch": _whole(1, MAX_BATCH),
        "max_sliders": _whole(1, MAX_SLIDERS),
        "config": _mapping(_plain),
        "inputs": _SPECS,
        "outputs": _SPECS,
        "files": _mapping(_record(_FILE), key=_file_name),
        "created": _text,
        "versions": _mapping(_text),
        "schema_version": _whole(SCHEMA_VERSION, SCHEMA_VERSION),
    },
    {
        "ranges": _mapping(_rising, key=_one_of(*_AXES)),
        "reading_ranges": _mapping(_rising, key=_one_of(*_AXES)),
        "dtype": _one_of("float32", "bfloat16", "float16"),
        "updates": _COUNTS,
        "layers": _COUNTS,
        "compatibility": _record(
            {}, {"versions": _one_of(True, False), "hardware": _one_of("none", "ampere_plus", "same_compute_capability")}
        ),
        "weight_streaming": _one_of(True, False),
        "precision": _one_of(None, *PRECISIONS),
        "quantised": _mapping(_whole(1, _LARGEST), key=_one_of(*PRECISIONS)),
        "plan": _record({}, {"gemms": _COUNTS, "weights": _mapping(_BYTES)}),
        "fused": _list(_FUSED, most=MAX_FUSED),
        "defaults": _defaults,
        "adapter_inputs": _either(_record({}), _LAYOUT),
        "links": _mapping(_record(_FILE | {"kind": _one_of("hard", "symbolic")}), key=_file_name),
    },
)


def _parse(data: dict[str, Any]) -> Manifest:
    """Make a manifest from its JSON.

    Raises:
        ValueError: The JSON does not describe an engine.
    """
    _MANIFEST(data, "the manifest")
    specs = {key: [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data[key]] for key in ("inputs", "outputs")}
    manifest = Manifest(**(data | specs))
    if manifest.kind == "st" and "gst" in manifest.member_kinds.values():
        raise ValueError("adapter is a bank of kind st with a member of kind gst")
    # An unknown family is reported later, with a list of the known ones.
    if family := FAMILIES.get(manifest.family):
        try:
            described = manifest.config, manifest.dtype
            inputs, outputs = family.input_specs(*described), family.output_specs(*described)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"config lacks what a {family.name} needs: {error}") from None
        if manifest.inputs[: len(inputs)] != inputs or manifest.outputs != outputs:
            raise ValueError(f"inputs and outputs are not those that this version gives a {family.name} with this config")
    specs_of_adapter = manifest.layout.specs() if manifest.layout else []
    if [spec for spec in manifest.inputs if is_adapter_input(spec.name)] != specs_of_adapter:
        raise ValueError("inputs are not those that adapter_inputs describes")
    return manifest

"""ServeSettings: options of a server, shared by the single-process server and Ray Serve replicas."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slideredit_rt.assets import from_anywhere
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import user_path
from slideredit_rt.settings import ComponentDType, Offload, RunSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_VARIABLE = "SLIDEREDIT_API_KEY"
_NAME = re.compile(r"[^\s/:@?\[\]]+")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_AT_LEAST = {
    "max_queue": 1,
    "cache_mib": 0,
    "adapters_mib": 1,
    "preview_steps": 1,
    "drain_seconds": 0,
}
_ABOVE_ZERO = ("max_megapixels", "max_body_mib", "request_seconds")


@dataclass(frozen=True)
class ServeSettings:
    """Options of a server. Each field is an option of `slideredit-rt serve` with the same name.

    Attributes:
        engine: Folder written by `slideredit-rt build`; None takes the embedded engine.
        host, port: Address to listen on; port 0 picks a free one.
        model: Model name for clients; None takes the name of the engine folder.
        api_key_file: File with the API key, read by the process that serves.
        api_key: The API key itself. Without either, it is read from `$SLIDEREDIT_API_KEY`; if that is unset, none is required.
        allowed_host: Host names of the server, as `host_pattern` returns them.
        allow_origin: Origins whose web pages may use the server, as `web_origin` returns them.
        base: Base checkpoint; None takes the location in the manifest.
        threads: CPU threads of the backend; None leaves the choice to it.
        max_queue: Most images that may wait.
        max_batch: Most images in an engine step; None takes the engine's.
        step_batching: Share steps between edits; otherwise they run one after the other.
        cache_mib: Memory for encoded images, prompts and latents, in MiB; None takes 256, and in addition the keys and values
            of an image for an engine that reads source images once.
        latent_cache: Keep the latents of first steps without sliders and of finished edits.
        adapters: Folder of the adapters that requests can choose, for an engine with adapter inputs; None offers no choice.
        adapters_mib: Device memory for these adapters, in MiB.
        max_megapixels, max_body_mib: Largest image, in megapixels, and largest request body, in MiB.
        request_seconds: Time limit of an edit.
        preview_steps: Denoising steps of previews that do not set num_inference_steps.
        preview_decoder: Folder or hub repository of a tiny autoencoder that decodes previews and partial images; None decodes
            them like all images.
        drain_seconds: Time for accepted edits to finish on shutdown.
        min_replicas, max_replicas: Ray Serve replicas at all times, and at most while the queue is long; None takes the former.
        replica_cpus, replica_gpus: CPUs and GPUs that Ray reserves per replica.
        device, dtype, offload: Fields of `RunSettings`.

    Raises:
        SliderEditError: A value is out of range.
    """

    engine: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    model: str | None = None
    api_key_file: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    allowed_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    base: str | None = None
    threads: int | None = None
    max_queue: int = 64
    max_batch: int | None = None
    step_batching: bool = True
    cache_mib: int | None = None
    latent_cache: bool = True
    adapters: Path | None = None
    adapters_mib: int = 1024
    max_megapixels: float = 16.0
    max_body_mib: float = 32.0
    request_seconds: float = 300.0
    preview_steps: int = 4
    preview_decoder: str | None = None
    drain_seconds: float = 30.0
    min_replicas: int = 1
    max_replicas: int | None = None
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    device: str = "auto"
    dtype: ComponentDType = "auto"
    offload: Offload = RunSettings.offload

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SliderEditError(f"--port is {self.port}; give 0 to 65535")
        for name, least in _AT_LEAST.items():
            if (given := getattr(self, name)) is not None and not given >= least:
                raise SliderEditError(f"{_option(name)} is {given}; give at least {least}")
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise SliderEditError(f"{_option(name)} is {getattr(self, name):g}; give a number above 0")
        low, high = self.min_replicas, self.most_replicas
        if not 1 <= low <= high:
            raise SliderEditError(
                f"--min-replicas is {low} and --max-replicas {high}; give at least 1, and a maximum not below the minimum"
            )
        self.run(None)  # raises for values that are out of range
        object.__setattr__(self, "allowed_host", tuple(map(host_pattern, self.allowed_host)))
        object.__setattr__(self, "allow_origin", tuple(map(web_origin, self.allow_origin)))

    def run(self, options: Any) -> RunSettings:
        """Return how the engine is run, with the run options of its backend."""
        return RunSettings(self.device, self.dtype, self.offload, self.threads, options)

    def from_anywhere(self) -> ServeSettings:
        """Return the same settings for a process with another working folder: existing paths become absolute."""
        paths = {name: getattr(self, name) for name in ("engine", "api_key_file", "adapters")}
        sources = {name: getattr(self, name) for name in ("base", "preview_decoder")}
        found: dict[str, Any] = {name: path.resolve() for name, path in paths.items() if path is not None}
        found |= {name: from_anywhere(source) for name, source in sources.items() if source is not None}
        return replace(self, **found)

    @property
    def most_replicas(self) -> int:
        return self.min_replicas if self.max_replicas is None else self.max_replicas

    def read_key(self) -> str | None:
        """Return the API key; None if none is required.

        Raises:
            SliderEditError: The file cannot be read, or the key cannot be sent in a header.
        """
        if self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SliderEditError(
                    f"the key file {str(self.api_key_file)!r} cannot be read ({error}); give a text file with the key"
                ) from None
        else:
            given = self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE)
            if given is None:
                return None
            key = given
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise SliderEditError("the API key is empty or has spaces or non-ASCII characters; choose another one")
        return key

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> ServeSettings:
        """Parse the arguments of `serve run` and of Ray's configuration files.

        Args:
            arguments: Fields by name. Values may be text; fields with several values take a list or a single value.

        Raises:
            SliderEditError: A name is not a field, or a value does not have its type.
        """
        # Imported here because pydantic comes with FastAPI, which building settings in Python does not need.
        from pydantic import TypeAdapter, ValidationError

        given, known = dict(arguments), [each.name for each in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise SliderEditError(f"{unknown[0]!r} is not an option of the server; known: {', '.join(known)}")
        for name in ("allowed_host", "allow_origin"):
            if isinstance(given.get(name), str):
                given[name] = [given[name]]
        for name in ("engine", "api_key_file", "adapters"):
            if isinstance(given.get(name), str):
                given[name] = user_path(given[name])
        try:
            return TypeAdapter(cls).validate_python(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            message = first["msg"][:1].lower() + first["msg"][1:]
            raise SliderEditError(f"{first['loc'][0]} is {first['input']!r}: {message}") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def is_address(name: str) -> bool:
    """Return whether a host name is an IP address."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def host_pattern(text: str) -> str:
    """Normalise a value of `--allowed-host` for comparison with `Host` headers.

    Args:
        text: A host name without a port; `*` stands for any characters.

    Raises:
        SliderEditError: The text is a URL, has a port, or is not a host name.
    """
    name = text.strip().lower().removesuffix(".")
    if not (is_address(name) or _NAME.fullmatch(name)):
        raise SliderEditError(
            f"--allowed-host {text!r} is not a host name; give one such as gpu-box.example.com, without a port"
        )
    return name


def web_origin(text: str) -> str:
    """Normalise a value of `--allow-origin` to the form that browsers send.

    Args:
        text: `scheme://host[:port]`; `*` for any page, `null` for pages without an origin (files, sandboxed frames).

    Raises:
        SliderEditError: The text is anything else, such as an address with a path.
    """
    text = text.strip().lower()
    if text in ("*", "null"):
        return text
    try:
        parts = urlsplit(text)
        port = None if parts.port == _DEFAULT_PORTS.get(parts.scheme) else parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not (parts.scheme and parts.hostname) or "@" in parts.netloc or text != f"{parts.scheme}://{parts.netloc}":
        raise SliderEditError(f"--allow-origin {text!r} is not an origin; give scheme://host[:port], as in https://example.com")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")

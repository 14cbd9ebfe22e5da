"""Number formats of quantised linears: how weights are stored and what activations are rounded to.

- fp8: `weight` F8_E4M3 `[N, K]`, `weight_scale` float32 `[N]`, `input_scale` a float32 scalar
- int8: `weight` I8 `[N, K]`, `weight_scale` float32 `[N]`
- int4: `weight` U8 `[N, K/2]`, `weight_scale` float32 `[N, K/128]`
- nvfp4: `weight` U8 `[N, K/2]`, `weight_scale` F8_E4M3 `[N, K/16]`, `weight_scale_2` and `input_scale` float32 scalars

The names and the layouts of fp8 and nvfp4 are those of NVIDIA's ModelOpt. Two 4-bit values share a byte, the one with the even
column in the low half, as in ONNX and ModelOpt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError

PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
"""Tensors of a quantised linear besides its bias; no precision has all of them."""

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_FP8_SMALLEST = 2.0**-9
_FP4_MAX = 6.0
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the 3-bit magnitudes of E2M1
_NVFP4_BLOCK = 16
_ROWS = 64  # rows that are quantised together: few enough for the processor's cache
# Activations may exceed the largest value of the calibration by this factor before they are clamped. Floating-point formats
# lose next to no accuracy by it, and strong edits gain some.
_HEADROOM = 2.0


@dataclass(frozen=True)
class Part:
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """Accuracy that an engine of a precision must reach against the unquantised float32 reference.

    Attributes:
        step_rms: Largest relative root mean square error of a denoising step at timestep 0.7, and on average over all steps.
        psnr: Smallest peak signal-to-noise ratio of a final image, in dB.
    """

    step_rms: float
    psnr: float


class Precision(ABC):
    """A number format for linears.

    Attributes:
        name: Name in commands and configurations.
        title: Description for people.
        algorithm: `quant_algo` of a linear in a checkpoint's configuration, in ModelOpt's terms.
        weight_only_algorithm: The same for a linear whose activations are not quantised; None if that is not offered.
        capabilities: Compute capabilities that are known to compute in it, the oldest first; later ones do, too. None for all.
        quantises_activations: True if activations are quantised as well, which needs a calibration.
        modulation: Name of the precision that modulation (adaLN) weights get beside it, weight-only.
        limits: Accuracy limits of engines.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    algorithm: ClassVar[str]
    weight_only_algorithm: ClassVar[str | None]
    capabilities: ClassVar[tuple[str, ...] | None] = None
    quantises_activations: ClassVar[bool] = False
    modulation: ClassVar[str]
    limits: ClassVar[Limits]

    def takes(self, k: int) -> bool:
        """Return whether a linear with `k` input features can be stored in this precision."""
        return True

    def runs_on(self, capability: str) -> bool:
        """Return whether a GPU of a compute capability, such as `sm89`, computes in this precision."""
        number = int(capability.removeprefix("sm"))
        return self.capabilities is None or number >= min(int(known.removeprefix("sm")) for known in self.capabilities)

    @abstractmethod
    def layout(self, n: int, k: int) -> dict[str, Part]:
        """Return dtypes and shapes of a weight's parts, without `input_scale`.

        Args:
            n: Output features.
            k: Input features, which pass `takes`.
        """

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise a finite weight, float32 `[N, K]`; return its parts as `layout` describes them."""
        whole = self._whole(weight)
        chunks = [self._rows(rows, whole) for rows in weight.split(_ROWS)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]} | whole

    def _whole(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts that depend on all rows of a weight."""
        return {}

    @abstractmethod
    def _rows(self, weight: Tensor, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Quantise some rows of a weight, float32 `[rows, K]`; return the parts that have as many rows."""

    @abstractmethod
    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that parts stand for, float32 `[N, K]`. Parts besides those of `layout` are ignored."""

    def input_scale(self, amax: float) -> float:
        """Return the `input_scale` for activations whose largest absolute value in calibration was `amax`."""
        raise NotImplementedError(f"{self.name} does not quantise activations")

    def fake_quantise(self, x: Tensor, input_scale: Tensor) -> Tensor:
        """Round activations to the values that the precision can represent; values that are too large are clamped.

        Args:
            x: `[..., K]`, float32 or float64.
            input_scale: Scalar, float32.

        Returns:
            `[..., K]` in the dtype of `x`.
        """
        raise NotImplementedError(f"{self.name} does not quantise activations")


def scale_of(amax: Tensor, largest: float) -> Tensor:
    """Return the scales that map maxima to `largest`; 1 for a maximum of 0, and never below the smallest normal float32.

    Scales are rounded to bfloat16, in which engines need them, so that weights are rounded with the scale that engines use.
    What that puts past `largest`, at most 0.4%, is clamped.
    """
    scale = (amax / largest).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16).to(amax.dtype)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def to_fp8(x: Tensor) -> Tensor:
    """Round to E4M3; values that are too large are clamped."""
    # Some versions of torch convert values above 448 to NaN.
    return x.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)


def _pack(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, uint8 `[N, K]`, into uint8 `[N, K/2]`."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    """Unpack uint8 `[N, K/2]` into 4-bit codes, uint8 `[N, K]`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


class FP8(Precision):
    """8-bit floating point (E4M3) with a scale per output channel and one for all activations of a linear."""

    name = "fp8"
    title = "FP8 weights and activations"
    algorithm = "FP8"
    weight_only_algorithm = "W8A16_FP8"
    capabilities = ("sm89", "sm90", "sm100", "sm120")
    quantises_activations = True
    modulation = "int8"
    limits = Limits(step_rms=0.045, psnr=45.0)

    def layout(self, n: int, k: int) -> dict[str, Part]:
        return {"weight": Part(_FP8, (n, k)), "weight_scale": Part(torch.float32, (n,))}

    def _rows(self, weight: Tensor, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = scale_of(weight.abs().amax(dim=1), _FP8_MAX)
        return {"weight": to_fp8(weight / scale[:, None]), "weight_scale": scale}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        weight: Tensor = parts["weight"].float() * parts["weight_scale"].reshape(-1, 1)
        return weight

    def input_scale(self, amax: float) -> float:
        return float(scale_of(torch.tensor(_HEADROOM * amax), _FP8_MAX))

    def fake_quantise(self, x: Tensor, input_scale: Tensor) -> Tensor:
        return to_fp8(x / input_scale).to(x.dtype) * input_scale


class INT8(Precision):
    """8-bit integers with a scale per output channel.

    Scales per block of inputs would be a little more accurate, but TensorRT-RTX 1.7 expands such weights in every step.
    """

    name = "int8"
    title = "INT8 weights"
    algorithm = "W8A16"
    weight_only_algorithm = "W8A16"
    modulation = "int8"
    limits = Limits(step_rms=0.015, psnr=55.0)

    def layout(self, n: int, k: int) -> dict[str, Part]:
        return {"weight": Part(torch.int8, (n, k)), "weight_scale": Part(torch.float32, (n,))}

    def _rows(self, weight: Tensor, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scale = scale_of(weight.abs().amax(dim=1), 127.0)
        rounded = (weight / scale[:, None]).round_().clamp_(-127, 127)
        return {"weight": rounded.to(torch.int8), "weight_scale": scale}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"].float() * parts["weight_scale"].reshape(-1, 1)


class INT4(Precision):
    """4-bit integers (−8 to 7, two's complement) with a scale per block of input features.

    Blocks have the largest of 128, 64, 32 or 16 features that makes two or more blocks. TensorRT-RTX 1.7 does not fuse a single
    block per channel into a GEMM.
    """

    name = "int4"
    title = "INT4 weights"
    algorithm = "W4A16"
    weight_only_algorithm = "W4A16"
    modulation = "int8"
    limits = Limits(step_rms=0.11, psnr=35.0)

    def takes(self, k: int) -> bool:
        return k % 16 == 0

    def _block(self, k: int) -> int:
        return next((size for size in (128, 64, 32) if k % size == 0 and k > size), 16)

    def layout(self, n: int, k: int) -> dict[str, Part]:
        return {"weight": Part(torch.uint8, (n, k // 2)), "weight_scale": Part(torch.float32, (n, k // self._block(k)))}

    def _rows(self, weight: Tensor, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = weight.unflatten(1, (-1, self._block(weight.shape[1])))
        scale = scale_of(blocks.abs().amax(dim=2), 7.0)
        rounded = (blocks / scale[:, :, None]).round_().clamp_(-8, 7).to(torch.int8).flatten(1)
        return {"weight": _pack(rounded.view(torch.uint8) & 15), "weight_scale": scale}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        # Flipping the sign bit maps the codes of −8 to 7 to 0 to 15.
        values = (_unpack(parts["weight"]) ^ 8).float() - 8
        scale = parts["weight_scale"]
        weight: Tensor = values.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
        return weight.flatten(1)


class NVFP4(Precision):
    """4-bit floating point (E2M1) with an FP8 scale per 16 features and a float32 scale per tensor."""

    name = "nvfp4"
    title = "NVFP4 weights and activations"
    algorithm = "NVFP4"
    weight_only_algorithm = None
    capabilities = ("sm100", "sm120")
    quantises_activations = True
    modulation = "int8"
    limits = Limits(step_rms=0.15, psnr=33.0)

    def takes(self, k: int) -> bool:
        return k % _NVFP4_BLOCK == 0

    def layout(self, n: int, k: int) -> dict[str, Part]:
        return {
            "weight": Part(torch.uint8, (n, k // 2)),
            "weight_scale": Part(_FP8, (n, k // _NVFP4_BLOCK)),
            "weight_scale_2": Part(torch.float32, ()),
        }

    def _whole(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight_scale_2": scale_of(torch.stack(weight.aminmax()).abs().amax(), _FP8_MAX * _FP4_MAX)}

    def _rows(self, weight: Tensor, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes, scale = self._round(weight, whole["weight_scale_2"])
        return {"weight": _pack(codes), "weight_scale": scale}

    def dequantise(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self._values(_unpack(parts["weight"]), parts["weight_scale"], parts["weight_scale_2"])

    def input_scale(self, amax: float) -> float:
        return float(scale_of(torch.tensor(_HEADROOM * amax), _FP8_MAX * _FP4_MAX))

    def fake_quantise(self, x: Tensor, input_scale: Tensor) -> Tensor:
        return self._values(*self._round(x.float(), input_scale), input_scale).to(x.dtype)

    def _round(self, x: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of `x`, uint8 `[..., K]`, and the block scales, F8_E4M3 `[..., K/16]`."""
        blocks = x.unflatten(-1, (-1, _NVFP4_BLOCK))
        wide = blocks.abs().amax(dim=-1) / _FP4_MAX / second
        # The scale of a small block must not become 0; that of an empty block may have any value.
        scale = to_fp8(wide.clamp_min(_FP8_SMALLEST))
        scaled = blocks / (scale.float() * second).unsqueeze(-1)
        size = scaled.abs()
        # The step between values is 0.5 up to 2, 1 up to 4, and 2 up to 6; ties go to the even code in each of these ranges.
        codes = torch.minimum((size * 2).round(), torch.minimum(size.round() + 2, (size / 2).round() + 4))
        magnitudes = codes.clamp_max(7).to(torch.uint8)
        return (magnitudes | (scaled < 0).to(torch.uint8) << 3).flatten(-2), scale

    def _values(self, codes: Tensor, scale: Tensor, second: Tensor) -> Tensor:
        """Return what codes stand for, float32 `[..., K]`."""
        table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], device=codes.device)
        blocks: Tensor = table[codes.int()].unflatten(-1, (-1, _NVFP4_BLOCK))
        return (blocks * (scale.float() * second).unsqueeze(-1)).flatten(-2)


PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (FP8(), INT8(), INT4(), NVFP4())}


def get_precision(name: str) -> Precision:
    """Return the precision named `name`.

    Raises:
        SliderEditError: There is no such precision.
    """
    if name not in PRECISIONS:
        raise SliderEditError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]

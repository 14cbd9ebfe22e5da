"""A stand-in for a GPU: CPU tensors under the device name `card`, for tests of placement on machines without one.

Values are computed on the CPU, so results can be compared. While a `StandIn` is entered, every transfer and every wait that a
CUDA device would cause is recorded as an `Event`:

| kind | cause |
|---|---|
| `sync` | the host needs a value: `item()`, `bool()`, `nonzero`, a boolean mask as an index |
| `download` | card to CPU |
| `upload` | CPU to card |
| `mixed` | tensors of both devices in one operator; it raises, as CUDA does |

Streams, memory limits, `.cuda()`, kernels and graphs are not modelled, and assignment through a boolean mask is not noticed.
Importing this module registers the device name for the whole process, and `torch.accelerator` then reports it, so it belongs in
a process of its own: `tests/on_card.py`.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")
CARD = torch.device("card", 0)
_aten = torch.ops.aten
_COPIES = {_aten._to_copy, _aten.copy_}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_WAITING = {
    *(_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.equal),
    *(_aten.allclose, _aten.is_nonzero, _aten.bincount, _aten.repeat_interleave),
}


@dataclass(frozen=True)
class Event:
    """A transfer or a wait.

    Attributes:
        kind: `sync`, `download`, `upload` or `mixed`.
        where: file and line of the project, and of the library that it called, if any.
        phase: what the test said was going on.
    """

    kind: str
    where: str
    phase: str


class CardTensor(torch.Tensor):
    """A tensor on the card; `held` is the CPU tensor with its values, whose memory views share."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CardTensor:
        shell: CardTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[assignment]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD
        )
        shell.held = held
        return shell

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the values: caches ask for its size."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """Download, as a CUDA tensor does."""
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CardTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a card tensor outside of `with StandIn()`; other threads enter `beside()`")


class StandIn(TorchDispatchMode):
    """The card, present in the thread that entered it.

    Attributes:
        events: what happened, in order of time.
        phase: of the test; recorded with each event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.phase = ""

    def beside(self, phase: str) -> StandIn:
        """Return the same card for another thread to enter, with a phase of its own."""
        other = StandIn()
        other.events, other.phase = self.events, phase
        return other

    def __enter__(self) -> StandIn:
        # torch.tensor(..., device=card) then moves its values where this mode sees it.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        entered: StandIn = super().__enter__()
        return entered

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def _record(self, kind: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        own = [f for f in frames if "/slideredit_rt/" in f.filename][-1:]
        places = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in (*own, *frames[-1:])]
        self.events.append(Event(kind, " > ".join(dict.fromkeys(places)), self.phase))

    def _watch(self, func: Any, tensors: list[torch.Tensor], goal: bool) -> None:
        """Record what a CUDA device would do in this call, whose result lies on the card if `goal`."""
        operator, on_card = func.overloadpacket, [isinstance(t, CardTensor) for t in tensors]
        strangers = any(not here and t.dim() > 0 for t, here in zip(tensors, on_card, strict=True))
        if operator in _COPIES:
            if on_card[-1] != goal:
                self._record("upload" if goal else "download")
        elif operator in _WAITING or (operator is _aten.index and any(t.dtype == torch.bool for t in tensors[1:])):
            self._record("sync")
        elif strangers and any(on_card):
            self._record("upload" if operator in _INDEXING else "mixed")
            if operator not in _INDEXING:
                raise RuntimeError(f"expected all tensors on one device, but {func} got cpu and {CARD}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        device = kwargs.get("device")
        involved = any(isinstance(t, CardTensor) for t in tensors)
        goal = involved if device is None else torch.device(device).type == CARD.type
        if not involved and not goal:
            return func(*args, **kwargs)
        if func.overloadpacket is _aten.copy_:
            goal = isinstance(tensors[0], CardTensor)
        self._watch(func, tensors, goal)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        shells = {id(t.held): t for t in tensors if isinstance(t, CardTensor)}  # operators in place return their argument
        held_args, held_kwargs = tree_map_only(CardTensor, lambda t: t.held, (args, kwargs))
        result = func(*held_args, **held_kwargs)
        return tree_map_only(torch.Tensor, lambda t: shells[id(t)] if id(t) in shells else CardTensor(t) if goal else t, result)

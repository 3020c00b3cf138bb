"""Tensors that live in the host's memory, or nowhere, and pose as tensors of another device.

Every operator on them is dispatched in Python, so that it can be counted with its phase and source line. An operator
that mixes devices raises, as on a GPU. With ``values=False`` tensors have shapes alone (torch's meta tensors), so that
a step of any size can be counted: what is then read from the device is made of zeros.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

MEMORY = 80 << 30
"""Bytes that the device says it has."""
_ROOT = Path(__file__).parents[2]
_aten = torch.ops.aten
_NO_KERNEL = {_aten._unsafe_view.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
"""Beside the views: operators that only make another handle to the same values."""
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.equal.default,
    _aten.bincount.default,
}
"""Operators whose result the host waits for."""
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class MixedDevices(RuntimeError):
    """An operator was given tensors of two devices."""


@dataclass(frozen=True)
class Event:
    """Something that happened on the device."""

    kind: str
    """``operator``, ``view``, ``upload``, ``synchronisation``."""
    phase: str
    operator: str
    line: str
    """``file:line`` of the innermost code of ours; ``autograd`` where there is none."""


@dataclass
class Memory:
    """Bytes of tensors on the device."""

    live: int = 0
    peak: int = 0
    """The largest ``live`` since it was last set."""
    saved: Counter[str] = field(default_factory=Counter)
    """Bytes that autograd keeps for the backward pass, by the phase that handed them over first; not what was there
    before the first phase, such as parameters."""

    def allocate(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def free(self, size: int) -> None:
        self.live -= size


class PretendTensor(Tensor):
    """A tensor of the device; ``inner`` holds its values or, on the meta device, its shape."""

    inner: Tensor  # type: ignore[assignment]  # nobody calls Tensor.inner of it
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=device()
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner})"

    def tolist(self) -> Any:
        """As a plain tensor's, which refuses subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it as a class method
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert PretendDevice.active is not None, "a tensor of the pretend device was used outside of its context"
        return PretendDevice.active.dispatch(function, args, kwargs or {})


class _Properties:
    total_memory = MEMORY


class _Module(_DummyBackendModule):
    """What ``torch.pretend`` is, as ``torch.cuda`` is for CUDA."""

    def get_device_properties(self, *_: Any) -> _Properties:
        return _Properties()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_device(self) -> int:
        return 0


@cache
def device() -> torch.device:
    """The device; registered with PyTorch when it is first asked for."""
    _setup_privateuseone_for_python_backend("pretend", _Module())
    _register_autocast()
    return torch.device("pretend", 0)


_HALVED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
"""Operators that autocast computes in half precision here; a GPU's list is longer."""
_libraries: list[Any] = []


def _register_autocast() -> None:
    anything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    anything.fallback(torch.library.fallthrough_kernel)
    ours = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in _HALVED:
        ours.impl(name, _halved(getattr(_aten, name).default))
    _libraries.extend((anything, ours))  # what they registered goes with them


def _halved(function: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("pretend")
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]  # not in its stub
        with torch._C._ExcludeDispatchKeyGuard(key):
            return function(*pytree.tree_map(lambda x: x.to(dtype) if _is_single(x) else x, args), **kwargs)

    return call


def _is_single(value: Any) -> bool:
    return isinstance(value, PretendTensor) and value.dtype == torch.float32


class PretendGenerator(torch.Generator):
    """A generator that says it lives on the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return device()


class PretendDevice(TorchDispatchMode):
    """A context in which the device exists; collects what happens on it."""

    active: "PretendDevice | None" = None

    def __init__(self, values: bool = True) -> None:
        super().__init__()
        self.home = torch.device("cpu" if values else "meta")
        self.events: list[Event] = []
        self.memory = Memory()
        self.peaks: dict[str, int] = {}
        """By phase, the most bytes above what was there when it began."""
        self._phases = ["outside"]
        self._silent = threading.local()
        self._made: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """Storages and the phases that made them."""
        self._saved: WeakKeyDictionary[Any, None] = WeakKeyDictionary()
        device()

    def __enter__(self) -> "PretendDevice":
        PretendDevice.active = self
        makers: dict[str, Any] = {name: _through_the_host(getattr(torch, name)) for name in ("tensor", "as_tensor")}
        self._patch = mock.patch.multiple(torch, **makers)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()
        PretendDevice.active = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(function, args, kwargs or {})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside under this name; of nested phases the innermost counts."""
        before, outer = self.memory.live, self.memory.peak
        self._phases.append(name)
        self.memory.peak = before
        try:
            yield
        finally:
            self._phases.pop()
            self.peaks[name] = max(self.peaks.get(name, 0), self.memory.peak - before)
            self.memory.peak = max(outer, self.memory.peak)

    @contextmanager
    def watched(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        """Make every call of ``owner.name`` a phase."""
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        with mock.patch.object(owner, name, call):
            yield

    def saving(self) -> Any:
        """A context that counts what autograd keeps."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda kept: kept)

    def _save(self, kept: Tensor) -> Tensor:
        if isinstance(kept, PretendTensor):
            storage = kept.inner.untyped_storage()
            if storage not in self._saved and self._made.get(storage) != "outside":
                self._saved[storage] = None
                self.memory.saved[self._phases[-1]] += storage.nbytes()
        return kept

    @contextmanager
    def one_operator(self, name: str) -> Iterator[None]:
        """Count everything inside as one operator."""
        self._note("operator", name)
        self._silent.on = True
        try:
            yield
        finally:
            self._silent.on = False

    def count(self, kind: str = "operator", phase: str | None = None) -> int:
        """Events of a kind, in one phase or in all but those outside any."""
        return sum(
            e.kind == kind and (e.phase != "outside" if phase is None else e.phase == phase) for e in self.events
        )

    def dispatch(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator on the values, count it, and pose its results as tensors of the device."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, PretendTensor)]
        wanted = kwargs.get("device")
        onto = bool(ours) if wanted is None else torch.device(wanted).type == "pretend"
        if (not ours and not onto) or function.namespace == "profiler":
            return function(*args, **kwargs)
        if function in _INDEXING and isinstance(args[0], PretendTensor):
            args = (args[0], [self._uploaded(index) for index in args[1]], *args[2:])
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._check(function, tensors, ours)
        self._record(function, args, ours, onto)
        if function is _aten._local_scalar_dense.default and self.home.type == "meta":
            return 0.0 if ours[0].is_floating_point() else 0
        plain = {**kwargs, "device": self.home if onto else torch.device("cpu")} if wanted is not None else kwargs
        inner_args, inner_kwargs = pytree.tree_map(_inner, (args, plain))
        result = self._run(function, inner_args, inner_kwargs, ours, onto)
        handles = {id(x.inner): x for x in ours}
        return pytree.tree_map(lambda x: self._posed(x, handles) if onto else x, result)

    def _run(self, function: Any, args: Any, kwargs: Any, ours: list[PretendTensor], onto: bool) -> Any:
        """The operator on the values; between the host and a device without values, copies keep shapes alone."""
        if self.home.type != "meta":
            return function(*args, **kwargs)
        if function is _aten.copy_.default and args[0].device.type == "cpu":
            return args[0].zero_()
        if not onto and function is _aten._to_copy.default:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **{k: None if isinstance(v, torch.Generator) else v for k, v in kwargs.items()})

    def _posed(self, value: Any, handles: dict[int, PretendTensor]) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in handles:
            return handles[id(value)]
        storage = value.untyped_storage()
        if storage not in self._made:
            self._made[storage] = self._phases[-1]
            self.memory.allocate(storage.nbytes())
            finalize(storage, self.memory.free, storage.nbytes())
        return PretendTensor(value)

    def _uploaded(self, index: Any) -> Any:
        """An index on the host is copied by the indexing itself."""
        if not isinstance(index, Tensor) or isinstance(index, PretendTensor):
            return index
        self._note("upload", "index")
        return PretendTensor(index.to(self.home))

    def _check(self, function: Any, tensors: list[Tensor], ours: list[PretendTensor]) -> None:
        """A number on the host may meet tensors of the device; more than one may only be copied."""
        foreign = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0]
        if ours and foreign and function not in _COPIES:
            shapes = [(tuple(x.shape), x.device.type) for x in tensors]
            raise MixedDevices(f"{function} at {_line()} was given tensors of two devices: {shapes}")

    def _record(self, function: Any, args: Any, ours: list[PretendTensor], onto: bool) -> None:
        name = str(function).removeprefix("aten.")
        view = function.is_view or function in _NO_KERNEL
        if function in _COPIES and _from_host(function, args):
            self._note("upload", name)
            return
        self._note("view" if view else "operator", name)
        if _waits(function, args, ours, onto):
            self._note("synchronisation", name)

    def _note(self, kind: str, name: str) -> None:
        if not getattr(self._silent, "on", False):
            self.events.append(Event(kind, self._phases[-1], name, _line()))


def _through_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and its like copy to the device out of sight of dispatch; made from them, one in sight."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        return make(data, **kwargs) if device is None else make(data, **kwargs).to(device)

    return made


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _from_host(function: Any, args: Any) -> bool:
    source = args[1] if function is _aten.copy_.default else args[0]
    return not isinstance(source, PretendTensor)


def _waits(function: Any, args: Any, ours: list[PretendTensor], onto: bool) -> bool:
    if function in _WAITING:
        return bool(ours)
    if function is _aten.repeat_interleave.Tensor:
        return True
    if function is _aten.copy_.default:
        return not isinstance(args[0], PretendTensor)
    if function in _INDEXING:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return function is _aten._to_copy.default and bool(ours) and not onto


def _line() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/mpformer/" in path.removeprefix(str(_ROOT)) and "site-packages" not in path:
            return f"{path.removeprefix(str(_ROOT) + '/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"

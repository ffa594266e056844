"""torch.cuda answers for a device that is not there, in this process until it ends. After the shim, before the engine
is imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from megarl.simulate.collectives import HOST_GROUPS
from megarl.simulate.kernels import register
from megarl.simulate.ledger import source_lines
from megarl.simulate.mode import SimulatedDevice

DEVICE = torch.device("cuda", 0)
_current: SimulatedDevice | None = None


@dataclass(frozen=True)
class Card:
    """What programs ask of a device's properties."""

    name: str = "simulated GPU"
    major: int = 9
    minor: int = 0
    total_memory: int = 80 << 30
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block_optin: int = 232448


def install() -> None:
    """Replaces what torch asks CUDA for. Once a process; torch.compile compiles nothing, since nothing is computed."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.compile = _compile  # type: ignore[assignment]
    torch._C._set_only_lift_cpu_tensors(True)
    _answer_device()
    _answer_streams()
    _answer_random()
    _answer_tensors()
    _answer_modules()
    _answer_objects()
    _answer_groups()
    register()


@contextlib.contextmanager
def simulated() -> Any:
    """A device of its own: nothing is allocated at the start."""
    global _current
    _current = SimulatedDevice()
    HOST_GROUPS.clear()  # names of groups come again
    try:
        with _current:
            yield _current
    finally:
        _current = None


def _compile(function: Any = None, **kwargs: Any) -> Any:
    if function is None:
        return functools.partial(_compile, **kwargs)

    @functools.wraps(function)
    def fused(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if _current is None else _current.fused(function, args, kwargs)

    return fused


def _wait(what: str) -> None:
    if _current is not None:
        _current.ledger.wait(what)


class _Stream:
    """Work has no duration, so that all streams are one."""

    device = DEVICE
    cuda_stream = stream_id = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        _wait("stream")

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("event")


def _answer_device() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda._lazy_init = lambda: None
    cuda.empty_cache = lambda: None
    cuda.get_device_properties = lambda device=None: Card()
    cuda.get_device_capability = lambda device=None: (Card.major, Card.minor)
    cuda.get_device_name = lambda device=None: Card.name
    cuda.memory_allocated = lambda device=None: _current.ledger.live if _current else 0
    cuda.max_memory_allocated = lambda device=None: _current.ledger.peak if _current else 0
    cuda.is_current_stream_capturing = lambda: False


def _answer_streams() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args: stream
    cuda.stream = lambda other: contextlib.nullcontext()
    cuda.set_stream = lambda other: None
    cuda.synchronize = lambda *args: _wait("device")
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    tensor: Any = Tensor
    tensor.record_stream = lambda self, stream: None
    tensor.pin_memory = _pin_memory


def _pin_memory(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    pinned = self.clone()
    pinned.untyped_storage()._pinned = True  # type: ignore[attr-defined]
    return pinned


def _answer_random() -> None:
    cuda: Any = torch.cuda
    generator = torch.Generator()
    cuda.default_generators = (generator,)
    cuda.manual_seed = cuda.manual_seed_all = generator.manual_seed
    get = lambda device="cuda": generator.get_state()
    put = lambda state, device="cuda": generator.set_state(state)
    cuda.get_rng_state, cuda.set_rng_state = get, put
    cuda.random.get_rng_state, cuda.random.set_rng_state = get, put


def _answer_tensors() -> None:
    """What reads a tensor below the dispatcher."""
    classes: tuple[Any, ...] = (Tensor, FakeTensor, torch.UntypedStorage)
    real, fake, storage = classes
    pointer, storage_pointer, make = Tensor.data_ptr, torch.UntypedStorage.data_ptr, torch.tensor

    def data_ptr(self: Tensor) -> int:
        if _current is not None and (isinstance(self, FakeTensor) or isinstance(self.data, FakeTensor)):
            return _current.address(self.untyped_storage()) + int(self.storage_offset()) * self.element_size()
        return pointer(self)

    def storage_data_ptr(self: torch.UntypedStorage) -> int:
        return _current.address(self) if _current is not None and _current.holds(self) else storage_pointer(self)

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, (list, tuple)):  # it reads the tensors in a list one by one
            data = tree_map(lambda x: x.item() if isinstance(x, FakeTensor) else x, data)
        return make(data, *args, **kwargs)

    def tolist(self: FakeTensor) -> Any:
        assert _current is not None
        return _current.ask(self, "tolist").tolist()

    def numpy(self: FakeTensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a CUDA tensor has no numpy(), at {source_lines()}")

    real.data_ptr = fake.data_ptr = data_ptr
    storage.data_ptr = storage_data_ptr
    torch.tensor = tensor
    fake.tolist, fake.numpy = tolist, numpy
    real.cuda = lambda self, *args, **kwargs: self.to(DEVICE)


def _answer_modules() -> None:
    """nn.Module.to swaps fake tensors with the real ones, which weak references to them forbid. A real one sets .data
    and keeps the parameter's attributes; so does this.
    """

    def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        for module in self.children() if recurse else []:
            module._apply(fn)
        for key, param in self._parameters.items():
            if param is None:
                continue
            with torch.no_grad():
                new = fn(param)
            if isinstance(param, FakeTensor) == isinstance(new, FakeTensor):
                param.data = new
                continue
            fresh = torch.nn.Parameter(new, param.requires_grad)
            fresh.__dict__.update(param.__dict__)
            self._parameters[key] = fresh
        self._buffers.update({key: fn(buffer) for key, buffer in self._buffers.items() if buffer is not None})
        return self

    torch.nn.Module._apply = apply  # type: ignore[method-assign]


def _answer_objects() -> None:
    """Pickled objects: the host waits for them, and a CUDA tensor among them would land on the sender's device."""

    def checked(what: str, objects: Any) -> None:
        _wait(what)
        if any(isinstance(x, FakeTensor) for x in tree_leaves(objects)):
            raise RuntimeError(f"{what} pickles a CUDA tensor, at {source_lines()}")

    def broadcast_object_list(objects: list[Any], *args: Any, **kwargs: Any) -> None:
        checked("broadcast_object_list", objects)

    def all_gather_object(out: list[Any], given: Any, *args: Any, **kwargs: Any) -> None:
        checked("all_gather_object", given)
        out[:] = [given] * len(out)

    def gather_object(given: Any, out: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
        checked("gather_object", given)
        if out is not None:
            out[:] = [given] * len(out)

    c10d: Any = dist
    c10d.broadcast_object_list, c10d.all_gather_object = broadcast_object_list, all_gather_object
    c10d.gather_object = gather_object


def _answer_groups() -> None:
    """A group of gloo's has no neighbours either."""
    make: Any = dist.new_group

    def new_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group = make(*args, **kwargs)
        if backend == "gloo":
            HOST_GROUPS.add(group.group_name)
        return group

    dist.new_group = new_group

"""The dispatch mode: tensors of the host stay real, tensors on `cuda` have shape, dtype and device alone."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megarl.simulate.collectives import run_collective
from megarl.simulate.flops import flops_of
from megarl.simulate.kernels import ANSWERS
from megarl.simulate.ledger import Ledger, Line, Wait, rounded, source_line, source_lines
from megarl.simulate.numbers import balanced_routes, beside, known, learn
from megarl.simulate.results import Results

aten = torch.ops.aten
ITEM = aten._local_scalar_dense.default
COPY, COPY_INTO = aten._to_copy.default, aten.copy_.default
INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
REPEAT = (aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor)
DEVICE_OF = torch.ops.prim.device.default
FIRST_ADDRESS = 1 << 40


class _Fakes(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:  # there is no CUDA to start
        return True


class SimulatedDevice(TorchDispatchMode):
    """One at a time, on what install() has prepared; what happens inside is in `ledger`."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self._fake = _Fakes(allow_non_fake_inputs=True)
        self._results = Results(self._fake)
        self._held: dict[int, tuple[int, Line, Any]] = {}  # by storage: bytes, line, a weak reference that ends them
        self._addresses: dict[int, int] = {}
        self._next = FIRST_ADDRESS
        self._fused = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap every operator, and nothing is compiled here
        return False

    # what the host asks for

    def ask(self, x: Tensor, how: str) -> Tensor:
        """The numbers of x on the host, which waits for them; ones where nobody knows them."""
        if x.device.type == "cuda":
            self.ledger.wait(how)
        numbers = known(x)
        if numbers is None:
            self.ledger.unknown[Wait(self.ledger.phase, how, source_line())] += 1
            return torch.ones(x.shape, dtype=x.dtype)
        return numbers

    def address(self, storage: torch.UntypedStorage) -> int:
        """A number that no other storage has, as long as this one lives."""
        key = storage._cdata
        if key not in self._held:
            self._track(storage)
        if key not in self._addresses:
            self._addresses[key] = self._next
            self._next += max(rounded(storage.nbytes()), 1 << 9)
        return self._addresses[key]

    def holds(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._held

    # memory

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, rounded(storage.nbytes())
        held = self._held.get(key)
        if held is not None:
            if held[0] == size:
                return
            self.ledger.free(held[0], held[1])
        line = source_line()

        def gone(_: Any) -> None:
            size, line, _ = self._held.pop(key)
            self._addresses.pop(key, None)
            self.ledger.free(size, line)

        self._held[key] = size, line, weakref.ref(storage, gone) if held is None else held[2]
        self.ledger.allocate(size, line)

    def fused(self, call: Any, args: Any, kwargs: Any) -> Any:
        """A function under torch.compile: of what it allocates only its results reach memory."""
        self._fused += 1
        try:
            out = call(*args, **kwargs)
        finally:
            self._fused -= 1
        self._track_all(out)
        return out

    def _track_all(self, out: Any) -> None:
        if self._fused:
            return
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, FakeTensor) and x.fake_device.type == "cuda":
                self._track(x.untyped_storage())

    # operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):  # asked for by every look at x.device
            return args[0].fake_device
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return run_collective(self.ledger, func, args)
        flat = _leaves(args, [])
        if kwargs:
            _leaves(kwargs.values(), flat)
        fakes = [x for x in flat if isinstance(x, FakeTensor)]
        if not fakes and not any(isinstance(x, torch.device) and x.type == "cuda" for x in flat):
            return _on_host(func, args, kwargs)
        if func is ITEM:
            return self.ask(args[0], "item").item()
        if func is COPY and fakes and _to_host(kwargs):
            return self._copy_to_host(args[0], kwargs)
        if func is COPY_INTO and not isinstance(args[0], FakeTensor) and args[0].device.type == "cpu":
            self._note_copy("to the host", _asynchronous(args[0], args, kwargs))
            return args[0]
        self._note_waits(func, args, kwargs, flat)
        out = self._run(func, args, kwargs, flat)
        self._track_all(out)
        if flops := flops_of(func, args, kwargs, out):
            self.ledger.flops[self.ledger.phase] += flops
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, flat: list[Any]) -> Any:
        numbers = beside(func, args, kwargs, flat)
        if numbers is None and func is aten.index.Tensor:
            args = (args[0], [_rows_of(i) for i in args[1]])
        key = self._results.key(func, args, kwargs)
        out: Any = None
        seen, out = self._results.find(key, args) if key is not None else (False, out)
        if not seen:
            out = self._work_out(func, args, kwargs, flat, numbers)
            if key is not None:
                self._results.keep(key, args, out)
        if numbers is not None:
            for x, value in zip(tree_leaves(out), tree_leaves(numbers), strict=True):
                learn(x, value)
        elif func is aten.topk.default and args[0].dim() == 2:
            learn(out[1], balanced_routes(args[0], args[1]))
        return out

    def _work_out(self, func: Any, args: Any, kwargs: Any, flat: list[Any], numbers: Any) -> Any:
        with self._fake:
            if numbers is not None and torch.Tag.dynamic_output_shape in func.tags:
                device = next(x.device for x in flat if isinstance(x, FakeTensor))
                make = lambda s: torch.empty(s.shape, dtype=s.dtype, device=device) if isinstance(s, Tensor) else s
                return tree_map(make, numbers)
            try:
                return ANSWERS.get(func, func)(*args, **kwargs)
            except Exception as error:
                shapes = [(tuple(x.shape), x.dtype, str(x.device)) for x in flat if isinstance(x, Tensor)]
                error.add_note(f"{func} of {shapes} at {source_lines()}")
                raise

    def _copy_to_host(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """torch pins the memory of a copy to the host that need not wait (TensorConversions.cpp, _to_copy)."""
        self._note_copy("to the host", bool(kwargs.get("non_blocking")))
        numbers = known(x)
        if numbers is None:
            self.ledger.unknown[Wait(self.ledger.phase, "copy", source_line())] += 1
            numbers = torch.zeros(x.shape, dtype=x.dtype)
        return numbers.to(kwargs.get("dtype") or x.dtype, copy=True)

    def _note_copy(self, way: str, asynchronous: bool) -> None:
        if asynchronous:
            self.ledger.copies[Wait(self.ledger.phase, f"copy {way}", source_line())] += 1
        else:
            self.ledger.wait(f"copy {way}")

    def _note_waits(self, func: Any, args: Any, kwargs: Any, flat: list[Any]) -> None:
        """Operators that wait for the device: copies between host and device, results whose size the device knows."""
        on_device = any(isinstance(x, FakeTensor) and x.fake_device.type == "cuda" for x in flat)
        if func is COPY and not on_device:
            self._note_copy("to the device", bool(kwargs.get("non_blocking")))
        elif func is COPY_INTO and _on_cuda(args[0]) and not _on_cuda(args[1]) and args[1].numel() > 0:
            if args[1].dim():
                self._note_copy("to the device", len(args) > 2 and bool(args[2]))
        elif func in INDEX and on_device:
            indices = [i for i in args[1] if i is not None]
            if any(not _on_cuda(i) for i in indices):
                self.ledger.wait("copy of an index to the device")
            fills = func is not aten.index.Tensor and args[2].numel() == 1  # torch makes that a masked_fill
            if not fills and any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.ledger.wait("index by a mask")
        elif on_device and (
            torch.Tag.dynamic_output_shape in func.tags
            or (func in REPEAT and kwargs.get("output_size") is None)
            or func is aten.equal.default
        ):
            self.ledger.wait(func._schema.name.removeprefix("aten::"))


def _rows_of(index: Tensor | None) -> Tensor | None:
    """The rows that a mask keeps, where its numbers are known: of what it indexes the size is known then."""
    if index is None or index.dtype is not torch.bool or index.dim() != 1:
        return index
    mask = known(index) if isinstance(index, FakeTensor) else index
    return index if mask is None else mask.nonzero().flatten().to(index.device)


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pinned = kwargs.pop("pin_memory", False)
    out = func(*args, **kwargs)
    if pinned:
        out.untyped_storage()._pinned = True
    return out


def _to_host(kwargs: dict[str, Any]) -> bool:
    return getattr(kwargs.get("device"), "type", None) == "cpu"


def _on_cuda(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def _leaves(x: Any, into: list[Any]) -> list[Any]:
    """What lies in lists and tuples, one after the other."""
    for part in x:
        if isinstance(part, (list, tuple)):
            _leaves(part, into)
        else:
            into.append(part)
    return into


def _asynchronous(host: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
    wanted = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    return bool(wanted) and hasattr(host.untyped_storage(), "_pinned")

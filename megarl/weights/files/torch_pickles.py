"""What torch pickles in a checkpoint, read and written without it: its import takes longer than a checkpoint of 2 GB,
and that of its checkpoint package as long again.

Nothing that a pickle names is called here. The names are those of torch/distributed/checkpoint (metadata.py,
filesystem.py) and of torch/_utils.py; tests/unit/test_convert.py holds that torch reads what is written here, and this
what torch writes.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

from megarl.errors import UserError
from megarl.weights.files.raw_file import ITEMSIZE, Spec, row_strides
from megarl.weights.rect import Rect, Shape

CHECKPOINT = "torch.distributed.checkpoint"
STORAGE = {  # torch's class of a storage, by dtype
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
OTHER_DTYPES = "uint16 uint32 uint64 complex32 complex64 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
NAMES = 256  # the first number of a name in the memo of a pickle
_DTYPES = {*ITEMSIZE, *OTHER_DTYPES.split()}


class MetadataPickle(pickle.Unpickler):
    """The pickle of `.metadata`. Nothing that it names is called: its objects are _Standin with the same attributes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        known = {kind.__name__.strip("_"): kind for kind in (TensorStorageMetadata, _TensorProperties)}
        return known.get(name, _Standin) if module == f"{CHECKPOINT}.metadata" else _Standin


class OwnMetadataPickle(MetadataPickle):
    """The names that a checkpoint needs alone. What BUILD would change of a class is a TypeError of its stand-in."""

    ALLOWED: ClassVar = {
        f"{CHECKPOINT}.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties"
        " ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        f"{CHECKPOINT}.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
        f"{CHECKPOINT}.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
    }

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch" and (name == "Size" or name in _DTYPES)
        if plain or name in self.ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        raise UserError(f"it names {module}.{name}")


class _Standin:
    """Of any object of the pickle: a chunk's place, parts of a save plan, the metadata itself, whose class is
    megatron-core's own in its older releases. Takes whatever it is given.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class TensorStorageMetadata(_Standin):
    properties: Any
    size: Any


class _TensorProperties(_Standin):
    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class TensorPickle(pickle.Unpickler):
    """The pickle of a single saved tensor: its strides. Calls nothing that the pickle names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        loaded = self.load()
        if not isinstance(loaded, tuple) or loaded[0]:
            raise ValueError("no tensor that begins its storage")
        self.strides = tuple(loaded[1])

    def persistent_load(self, pid: Any) -> Any:
        return None

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *rest: (offset, stride)
        if name == "_rebuild_parameter":
            return lambda data, *rest: data
        return type(name, (), {}) if name.endswith("Storage") else OrderedDict if name == "OrderedDict" else None


def tensor_pickle(spec: Spec) -> bytes:
    """What torch.save pickles of a tensor that begins its storage, which is the record data/0, row after row."""
    storage = _plain("storage") + _name("torch", f"{STORAGE[spec.dtype]}Storage") + _plain("0") + _plain("cpu")
    storage = b"(" + storage + _plain(spec.numel) + b"tQ"
    arguments = storage + _plain(0) + _plain(spec.shape) + _plain(row_strides(spec.shape)) + _plain(False)
    hooks = _name("collections", "OrderedDict") + b")R"
    return b"\x80\x02" + _name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + hooks + b"tR."


Stored = tuple[str, Rect, str, int, int]  # key, rectangle, file, its first byte there, bytes


def metadata_pickle(specs: dict[str, Spec], chunks: Iterable[Stored]) -> bytes:
    """The `.metadata` of a checkpoint with these tensors."""
    names = _Names()
    chunks = list(chunks)
    parts: dict[str, list[bytes]] = {key: [] for key in specs}
    for key, rect, *_ in chunks:
        place = [("offsets", names.size(rect.offset)), ("sizes", names.size(rect.size))]
        parts[key].append(names.made("metadata", "ChunkStorageMetadata", _dict(place)))
    tensors = [(key, names.tensor(spec, parts[key])) for key, spec in specs.items()]
    storage = []
    for key, rect, file, offset, length in chunks:
        index = [("fqn", _plain(key)), ("offset", names.size(rect.offset)), ("index", _plain(None))]
        where = _plain({"relative_path": file, "offset": offset, "length": length})
        storage.append(names.made("metadata", "MetadataIndex", _dict(index)))
        storage.append(names.made("filesystem", "_StorageInfo", where))
    meta = names.made(
        "metadata",
        "StorageMeta",
        _plain({"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}),
    )
    state = [
        ("state_dict_metadata", _dict(tensors)),
        ("planner_data", _plain({})),
        ("storage_data", b"}(" + b"".join(storage) + b"u"),
        ("storage_meta", meta),
        ("version", _plain(None)),
    ]
    whole = names.made("metadata", "Metadata", _dict(state))
    return b"\x80\x02" + names.first() + whole + b"."


class _Names:
    """Classes and functions, each told once and then by its number in the pickle's memo."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}

    def first(self) -> bytes:
        """What must come before anything that uses them."""
        return b"".join(_name(*name) + _memo(b"r", number) + b"0" for name, number in self._numbers.items())

    def get(self, module: str, name: str) -> bytes:
        return _memo(b"j", self._numbers.setdefault((module, name), NAMES + len(self._numbers)))

    def made(self, module: str, name: str, state: bytes) -> bytes:
        """An object of that class of the checkpoint package."""
        return self.get(f"{CHECKPOINT}.{module}", name) + b")\x81" + state + b"b"

    def size(self, shape: Shape) -> bytes:
        return self.get("torch", "Size") + _plain((shape,)) + b"R"

    def tensor(self, spec: Spec, parts: list[bytes]) -> bytes:
        layout = self.get("torch.serialization", "_get_layout") + _plain(("torch.strided",)) + b"R"
        memory = self.get(f"{CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING") + _plain((0,)) + b"R"
        properties = self.get("torch", spec.dtype) + layout + _plain(False) + memory + _plain(False)
        state = [
            ("properties", self.made("metadata", "TensorProperties", b"(" + properties + b"t")),
            ("size", self.size(spec.shape)),
            ("chunks", b"](" + b"".join(parts) + b"e"),
        ]
        return self.made("metadata", "TensorStorageMetadata", _dict(state))


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _memo(operation: bytes, number: int) -> bytes:
    return operation + number.to_bytes(4, "little")


def _plain(value: Any) -> bytes:
    """Of what Python pickles by itself. Its memo begins at 0 each time, which is why that of names begins at NAMES."""
    return pickle.dumps(value, 2)[2:-1]  # without protocol and stop


def _dict(items: Iterable[tuple[str, bytes]]) -> bytes:
    return b"}(" + b"".join(_plain(key) + value for key, value in items) + b"u"

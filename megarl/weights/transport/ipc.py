"""A buffer of one process, read by another on the same machine without
a copy in between: CUDA IPC, or shared memory on a CPU.

The handle is plain JSON, so it travels in the header of a weight sync. The owner must keep the buffer
until the reader has answered. torch offers this only as pickles of its own, which nobody should
accept from a network; the four calls below are its private half (torch/multiprocessing/reductions.py)
and are held by tests/unit/test_ipc.py. On a GPU: docs/gpu.md.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakTensorKeyDictionary

Handle = dict[str, Any]

# of a buffer: on CUDA every further sharing of a storage would wrap its pointer once more
_parts: Any = WeakTensorKeyDictionary()


def share(buffer: Tensor) -> Handle:
    """A handle for a contiguous uint8 buffer. On a CPU its memory moves
    into shared memory first (once: sharing it again is free).

    On CUDA the allocator must not use expandable segments: such memory has no IPC handle.
    """
    assert buffer.dtype == torch.uint8 and buffer.is_contiguous()
    whole = buffer if buffer._base is None else buffer._base
    if whole not in _parts:
        storage: Any = buffer.untyped_storage()
        _parts[whole] = [
            _encode(part) for part in (storage._share_cuda_()[1:] if buffer.is_cuda else storage._share_filename_cpu_())
        ]
    kind = "cuda" if buffer.is_cuda else "cpu"
    return {"kind": kind, "offset": buffer.storage_offset(), "bytes": buffer.numel(), "parts": _parts[whole]}


def open_shared(handle: Handle, device: torch.device) -> Tensor:
    """uint8 [bytes]: the owner's memory itself, on `device`, which must
    be the GPU that holds it (or one that reaches it).
    """
    return cut(open_whole(handle, device), handle)


def cut(whole: Tensor, handle: Handle) -> Tensor:
    """The buffer of a handle out of its storage."""
    return whole[handle["offset"] : handle["offset"] + handle["bytes"]]


def open_whole(handle: Handle, device: torch.device) -> Tensor:
    """The whole storage that the handle's buffer lies in, uint8: for a reader that meets
    it again under other offsets.
    """
    kind: Any = UntypedStorage
    parts = [_decode(part) for part in handle["parts"]]
    if handle["kind"] == "cuda":
        torch.cuda.init()
        storage = kind._new_shared_cuda(torch.device(device).index or 0, *parts)
    else:
        storage = kind._new_shared_filename_cpu(*parts)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _encode(part: Any) -> Any:
    return {"base64": base64.b64encode(part).decode()} if isinstance(part, bytes) else part


def _decode(part: Any) -> Any:
    return base64.b64decode(part["base64"]) if isinstance(part, dict) else part

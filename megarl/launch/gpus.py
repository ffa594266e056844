"""Which GPUs CUDA sees, asked of the driver without torch: no context is made, no memory taken."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from functools import cache
from pathlib import Path

from megarl.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
NONE = ("", "-1")  # its values that ask for none
DRIVER = Path("/dev/nvidiactl")  # there where a driver of NVIDIA's is, in a container too


def has_gpu() -> bool:
    """Whether torch would see a CUDA device; does not import torch.

    UserError where a GPU was planned, by a driver on this host and a CUDA build of torch, and CUDA sees none.
    """
    if not DRIVER.exists() or os.environ.get(VISIBLE) in NONE or not _cuda_build():
        return False
    count, why = driver_devices()
    if not count:
        raise UserError(
            f"this host has an NVIDIA driver, but CUDA sees no GPU ({why}); mend it (nvidia-smi), or set {VISIBLE}= "
            "(empty) to compute on the CPU"
        )
    return True


def gpu_names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use. CUDA numbers what it was given from 0; the
    numbers of /dev/nvidiaN are the host's.
    """
    count, _ = driver_devices()
    given = os.environ.get(VISIBLE)
    return given.split(",")[:count] if given else [str(ordinal) for ordinal in range(count)]


def refuse_lost_gpu(sees_cuda: bool) -> None:
    """UserError where this process was started for a GPU (CUDA_VISIBLE_DEVICES names one) and torch sees none: it
    would compute on the CPU, unsaid.
    """
    given = os.environ.get(VISIBLE)
    if given is not None and given not in NONE and not sees_cuda:
        raise UserError(
            f"{VISIBLE}={given}, but torch {importlib.metadata.version('torch')} sees no GPU; install a CUDA build "
            f"that the driver takes, or set {VISIBLE}= (empty) to compute on the CPU"
        )


def _cuda_build() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


@cache
def driver_devices() -> tuple[int, str]:
    """How many GPUs CUDA_VISIBLE_DEVICES, as it is now, leaves; or 0 and why."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return 0, str(error)
    count = ctypes.c_int(0)
    for call in (lambda: cuda.cuInit(0), lambda: cuda.cuDeviceGetCount(ctypes.byref(count))):
        if status := call():
            return 0, f"CUDA's error {status}"
    return count.value, "none is left to it"


def gpu_bytes() -> int:
    """Memory of the first GPU that this process may use; 0 where there is none."""
    if not driver_devices()[0]:
        return 0
    cuda, device, size = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_size_t(0)
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return size.value

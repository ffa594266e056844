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
MEANT = "MEGARL_NEEDS_GPU"  # the container sets it: without a driver it was started wrongly
ON_THE_CPU = f"set {VISIBLE}= (empty) to compute on the CPU"


def has_gpu() -> bool:
    """Whether torch would see a CUDA device; does not import torch.

    UserError where a GPU was planned, by a driver on this host and a CUDA build of torch, or by the container, and
    CUDA sees none.
    """
    if os.environ.get(VISIBLE) in NONE or not _cuda_build():
        return False
    if not DRIVER.exists() and not os.environ.get(MEANT):
        return False
    count, why = driver_devices()  # WSL has a driver without that file
    if not count and not DRIVER.exists():
        raise UserError(
            f"this container is for GPUs and has no NVIDIA driver; start it with --gpus all, or {ON_THE_CPU}"
        )
    if not count:
        raise UserError(
            f"this host has an NVIDIA driver, but CUDA sees no GPU ({why}); mend it (nvidia-smi), or {ON_THE_CPU}"
        )
    return True


def gpu_names() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use. CUDA numbers what it was given from 0; the
    numbers of /dev/nvidiaN are the host's.
    """
    count, _ = driver_devices()
    given = os.environ.get(VISIBLE)
    return given.split(",")[:count] if given else [str(ordinal) for ordinal in range(count)]


def refuse_lost_gpu(cuda: str | None) -> None:
    """For a process whose torch, built for this release of CUDA, sees no GPU: UserError where it was started for one
    (CUDA_VISIBLE_DEVICES names it, or the driver has some). It would compute on the CPU, unsaid.
    """
    given = os.environ.get(VISIBLE)
    named = given is not None and given not in NONE
    if not has_gpu() and not named:
        return
    torch = f"torch {importlib.metadata.version('torch')}, built for {f'CUDA {cuda}' if cuda else 'CPUs'}"
    seen = f"{VISIBLE}={given}" if named else "this host has a GPU"
    raise UserError(
        f"{seen}{_driver()}, but {torch}, sees no GPU; install a build that the driver takes, or a newer driver, "
        f"or {ON_THE_CPU}"
    )


def _driver() -> str:
    """Words for the release of CUDA that it goes up to; none where there is no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return ""
    return f" and a driver for CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"


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

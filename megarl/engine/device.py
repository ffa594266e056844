"""The device: CUDA with NCCL, or CPU with gloo. The only module that knows the difference.

Importing megarl.engine changes nothing in torch or megatron-core: `setup_device()` does, once, before the first model
or process group of this process. On CUDA it picks the device; on a CPU it also answers, for megatron-core 0.16, every
call that assumes CUDA; each answer names the file it is for (paths under megatron/core).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from megarl.engine.megatron_compat import check_release, replace_parts
from megarl.errors import UserError
from megarl.launch.gpus import refuse_lost_gpu

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Device:
    device: torch.device
    backend: str  # of torch.distributed

    def dtype(self, name: str) -> torch.dtype:
        """float32 | bfloat16 | auto (float32 on a CPU, bfloat16 on a GPU)."""
        if name == "auto":
            return torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return getattr(torch, name)

    def describe(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, CUDA {torch.version.cuda}, NCCL"
        return "CPU, gloo"


def setup_device() -> Device:
    """Picks the device of this process and makes megatron-core run on it. Idempotent.

    RuntimeError where megatron-core lacks a name that megarl needs (megatron_compat.py). UserError where a GPU was
    planned for this process and none is seen.
    """
    check_release()
    replace_parts()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        float32_means_float32()
        return Device(device, "nccl")
    refuse_lost_gpu(torch.version.cuda)
    # megatron's jit_fuser is torch.compile; without a C++ toolchain it would fail
    importlib.import_module("torch._dynamo").config.disable = True
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|NVIDIA Resiliency|hopper|Flash).*")
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    _answer_cuda_calls()
    _answer_megatron()
    return Device(CPU, "gloo")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: on a GPU through pinned memory, which torch keeps and uses again."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """In host memory, with one wait for all of them."""
    there = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.device.type == "cuda"]
    copies = list(tensors)
    for i in there:
        copies[i] = tensors[i].to(CPU, non_blocking=True)  # type: ignore[union-attr]
    if there:
        torch.cuda.current_stream().synchronize()
    return copies


def float32_means_float32() -> None:
    """No TF32 in float32 products (the router's), whatever the container asks for: NVIDIA's sets
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, from which torch takes its default. UserError where it cannot be turned off.
    """
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise UserError("NVIDIA_TF32_OVERRIDE=1 makes every float32 product TF32, the router's too; unset it")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def make_deterministic() -> None:
    """Deterministic kernels in this process, wherever torch has them,
    from here on (engine.deterministic). Before any matrix product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # split-k sums in float32


class _Stream:
    """The CPU has one queue and everything in it is in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _answer_cuda_calls() -> None:
    """torch.cuda.* that megatron-core calls for its device or its
    streams (token_dispatcher, p2p_communication, mappings, router ...).
    """
    stream = _Stream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign] # optimizer/distrib_optimizer.py:1089


class _TorchForCpu(ModuleType):
    """Stands in for the name `torch` inside one megatron module:
    device="cuda" in a factory means the CPU, and no memory is pinned.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in ("zeros", "ones", "tensor", "empty", "full"):
            value = _on_cpu(value)
        if name != "cuda":
            setattr(self, name, value)
        return value


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _answer_megatron() -> None:
    """Names inside megatron-core that assume CUDA."""
    core = "megatron.core."
    embeddings = "models.common.embeddings.rope_utils"  # pins memory for its indices under context parallelism
    optimizer = ("optimizer.optimizer", "optimizer.clip_grads", "optimizer.cpu_offloading.hybrid_optimizer")
    for name in ("pipeline_parallel.schedules", *optimizer, "utils", "transformer.moe.moe_utils", embeddings):
        importlib.import_module(core + name).__dict__["torch"] = _TorchForCpu()

    # tensor_parallel/random.py:447,457: the CUDA generator's state. No dropout anywhere in RL, so there is no state to
    # keep.
    random = importlib.import_module(core + "tensor_parallel.random")
    random.__dict__["_get_cuda_rng_state"] = lambda device="cuda", clone=False, graph_safe=False: torch.zeros(
        0, dtype=torch.uint8
    )
    random.__dict__["_set_cuda_rng_state"] = lambda new_state, device=-1, graph_safe=False: None

    # transformer/moe/moe_utils.py:1093 converts splits only if they lie on CUDA; all_to_all (mappings.py:443) refuses
    # tensors.
    dispatcher = importlib.import_module(core + "transformer.moe.token_dispatcher")
    dispatcher.__dict__["maybe_move_tensor_to_cpu"] = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    # optimizer/__init__.py:13 and distrib_optimizer.py:24 take Transformer Engine's or Apex's Adam wherever it is
    # installed; both need a GPU
    adam = importlib.import_module(core + "optimizer")
    adam.__dict__.update(Adam=torch.optim.AdamW, USING_PYTORCH_OPTIMIZER=True)
    distributed = importlib.import_module(core + "optimizer.distrib_optimizer")
    distributed.__dict__.update(Adam=torch.optim.Adam, USING_TE_OPTIMIZER=False, USING_APEX_OPTIMIZER=False)
    _answer_tensor_type()


def _answer_tensor_type() -> None:
    """optimizer/{optimizer.py:671,clip_grads.py:167,distrib_optimizer.py:361}
    compare Tensor.type() with 'torch.cuda.*'.
    """
    if getattr(torch.Tensor.type, "answers_for_megatron", False):
        return
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not args and not kwargs and f"{os.sep}optimizer{os.sep}" in sys._getframe(1).f_code.co_filename:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    type_.answers_for_megatron = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]

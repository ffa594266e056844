"""What we repair in vLLM on a CPU, whatever its release, as long as it has the names (vllm_release.py). tests/engine
holds each patch.

1. An in-place weight update skips the CPU's expert prepack (unquantized_fused_moe_method.py, _setup_kernel): silently
wrong experts.
2. The CPU's rotary kernel rotates nothing but the first head where a query has an axis of heads (DeepSeek-V3's models):
silently wrong.
3. Routes (AuxOutput connector) are wired to Model Runner V2 only, which needs Triton: we drive vLLM's own connector
from the CPU runner (vllm_capture.py).
4. On a CPU an output layer that is the embedding (tie_word_embeddings) keeps the old weights in oneDNN's memory when
the embedding is updated in place: silently wrong.
5. The CPU platform starts the engine by spawn, which imports everything once more: 15 s of CPU. Our servers of one
thread fork it, as vLLM does elsewhere.
6. The engine sends every token by itself: our servers, which answer when a request ends, get each request once.
7. Norms in float32 are eight torch operations: our servers take vLLM's own C kernel, which its registry offers to GPUs
alone.
8. An idle engine begins with the first request of a batch while the others are still on their way: our servers wait
for what follows at once.
9. Each token of a request with a seed asks that request's generator for one number, 7 us: our servers ask for many at a
time, and sample the same tokens.
10. The API server notes log-probabilities position by position: ours, which get a request at once, note them at once.
On CUDA none of this is imported: vLLM's own `enable_return_routed_experts` serves there.
"""

from __future__ import annotations

import os
import queue
import time
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import RequestOutputKind

from megarl.server.arrivals import Arrivals
from megarl.server.held_outputs import HeldOutputs
from megarl.server.plugin import FORKS, OWN_SERVER

NORMS = "megarl_c"  # our provider in vLLM's registry of implementations
NORM_LANES = 8  # of float32 in vLLM's csrc/cpu/layernorm.cpp, which aborts on other sizes
AHEAD = 64  # numbers of a request's generator
APART_S = 0.002  # requests of one batch come some 0.2 ms after each other
TOGETHER_S = 0.1  # at most so long after the first, however late the rest of its batch is
FLAT = {"start_indices", "end_indices", "token_ids", "logprobs", "ranks", "decoded_tokens"}  # of vLLM's FlatLogprobs
WORKER = "megarl.server.cpu_worker.RolloutWorker"


def apply() -> None:
    """Patches this process; may be called more than once."""
    _repack_experts_on_update()
    _rotate_every_head()
    _repack_tied_heads_on_update()
    _allow_routes_with_our_worker()
    _fork_the_engine()
    if OWN_SERVER in os.environ:
        _take_c_norms()
        _send_each_request_once()
        _begin_together()
        _draw_ahead()
        _note_at_once()


def _repack_experts_on_update() -> None:
    original = UnquantizedFusedMoEMethod._setup_kernel
    if getattr(original, "_megarl", False):
        return

    def _setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        is_update = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    _setup_kernel._megarl = True  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = _setup_kernel


def _repack_tied_heads_on_update() -> None:
    original = layerwise.finalize_layerwise_processing
    if getattr(original, "_megarl", False):
        return

    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        original(model, model_config)
        embeddings = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        for head in (layer for layer in embeddings if isinstance(layer, ParallelLMHead)):
            if any(head.weight is other.weight for other in embeddings if other is not head):
                head.quant_method.process_weights_after_loading(head)

    finalize_layerwise_processing._megarl = True  # type: ignore[attr-defined]
    layerwise.finalize_layerwise_processing = finalize_layerwise_processing


def _rotate_every_head() -> None:
    original = RotaryEmbedding.forward_cpu
    if getattr(original, "_megarl", False):
        return

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        """The kernel counts heads by the last axis: query [T, heads x size] is right, [T, heads, size] is not."""
        rotate = original if query.dim() == positions.dim() + 1 else RotaryEmbedding.forward_native
        return rotate(self, positions, query, key)

    forward_cpu._megarl = True  # type: ignore[attr-defined]
    RotaryEmbedding.forward_cpu = forward_cpu


def _allow_routes_with_our_worker() -> None:
    original = VllmConfig._verify_aux_output_compatibility
    if getattr(original, "_megarl", False):
        return

    def _verify(self: Any) -> None:
        if not self.aux_output_config.enabled or self.parallel_config.worker_cls != WORKER:
            original(self)
            return
        if not self.model_config.is_moe:
            raise ValueError("routes were asked of a model without experts: set replay.mode=none replay.metrics=false")
        if (
            not self.cache_config.enable_prefix_caching
            or self.parallel_config.pipeline_parallel_size > 1
            or self.speculative_config
        ):
            raise ValueError(
                "routes on a CPU need prefix caching on, pipeline parallelism 1 and no speculative decoding"
            )

    _verify._megarl = True  # type: ignore[attr-defined]
    VllmConfig._verify_aux_output_compatibility = _verify


def _fork_the_engine() -> None:
    original = CpuPlatform.check_and_update_config
    if getattr(original, "_megarl", False):
        return

    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        original(vllm_config)
        if os.environ.get(FORKS):
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    check_and_update_config._megarl = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _take_c_norms() -> None:
    """Of float32 in sizes that the kernel has; in bfloat16 it rounds once where the model rounds twice. A vLLM whose
    registry is another keeps its own norms.
    """
    try:
        from vllm.config.kernel import IrOpPriorityConfig
        from vllm.ir.ops import layernorm as norms
    except ImportError:
        return
    if NORMS in norms.rms_norm.impls:
        return

    def takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        if weight is None or variance_size is not None or x.shape[-1] % NORM_LANES:
            return False
        return x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()

    def takes_both(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> bool:
        fits = x.is_contiguous() and x_residual.is_contiguous() and x_residual.dtype == x.dtype
        return fits and takes(x, weight, epsilon, variance_size)

    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        torch.ops._C.rms_norm(out, x.contiguous(), weight, epsilon)
        return out

    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    def get_default_ir_op_priority(cls: type, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        ours = [NORMS, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=[*ours], fused_add_rms_norm=[*ours])

    try:
        norms.rms_norm.register_impl(NORMS, supports_args=takes)(rms_norm)
        norms.fused_add_rms_norm.register_impl(NORMS, supports_args=takes_both, inplace=True)(fused_add_rms_norm)
    except ValueError:  # other arguments
        return
    CpuPlatform.get_default_ir_op_priority = classmethod(get_default_ir_op_priority)


def _send_each_request_once() -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc._attach_weight_version
    if getattr(original, "_megarl", False):
        return

    def waits(request: Any) -> bool:
        params = request.sampling_params
        return params is not None and params.output_kind == RequestOutputKind.FINAL_ONLY and not params.stop

    def _attach_weight_version(self: Any, outputs: dict[int, Any]) -> None:
        """Called once a step, with what it sampled and before it is sent."""
        held = self.__dict__.setdefault("_megarl_held", HeldOutputs())
        for message in held.before(self._weight_version, EngineCoreOutputs):
            self.output_queue.put_nowait(message)
        held.take(outputs, self.scheduler.requests, waits)
        original(self, outputs)

    _attach_weight_version._megarl = True  # type: ignore[attr-defined]
    EngineCoreProc._attach_weight_version = _attach_weight_version


def _begin_together() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc._process_input_queue
    if getattr(original, "_megarl", False):
        return

    def _process_input_queue(self: Any) -> None:
        """Called before each step; returns once there is work. A batch, and requests that come no more than APART_S
        after each other, are sampled together from their first token on, however fast the engine is.
        """
        requests, arrivals = self.scheduler.requests, Arrivals()
        idle = not self.has_work() and not requests  # a paused engine has no work, but may have requests
        original(self)
        if not idle:
            return
        for request in requests:
            arrivals.came(request)
        known, deadline = len(requests), time.monotonic() + TOGETHER_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                order = self.input_queue.get(timeout=APART_S if arrivals.whole else left)
            except queue.Empty:
                return
            self._handle_client_request(*order)
            if len(requests) > known:
                arrivals.came(next(reversed(requests)))
            known = len(requests)

    _process_input_queue._megarl = True  # type: ignore[attr-defined]
    EngineCoreProc._process_input_queue = _process_input_queue


def _draw_ahead() -> None:
    """A vLLM that samples in another way keeps its own."""
    try:
        from vllm.v1.sample.ops import topk_topp_sampler as ops

        original, only = ops.TopKTopPSampler.forward_cpu, ops.apply_top_k_top_p
    except (ImportError, AttributeError):
        return
    if getattr(original, "_megarl", False) or not hasattr(torch.ops._C, "fused_gumbel_argmax"):
        return
    ahead: WeakKeyDictionary[torch.Generator, list[int]] = WeakKeyDictionary()  # the next one last

    def number(generator: torch.Generator) -> int:
        left = ahead.get(generator)
        if not left:
            drawn = torch.randint(0, 2**31, (AHEAD,), generator=generator, dtype=torch.long)
            left = ahead[generator] = drawn.tolist()[::-1]
        return left.pop()

    def forward_cpu(
        self: Any, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not generators or self.use_fp64_gumbel or self.logprobs_mode != "processed_logprobs":
            return original(self, logits, generators, k, p)
        logits = only(logits, k, p)
        seeds = torch.randint(0, 2**31, logits.shape[:1], dtype=torch.long)
        seeds.numpy()[[*generators]] = [number(generator) for generator in generators.values()]
        sampled = torch.ops._C.fused_gumbel_argmax(logits.to(dtype=torch.float32), seeds)
        return sampled, logits.log_softmax(dim=-1, dtype=torch.float32)

    forward_cpu._megarl = True  # type: ignore[attr-defined]
    forward_cpu._original = original  # type: ignore[attr-defined]
    ops.TopKTopPSampler.forward_cpu = forward_cpu


def _note_at_once() -> None:
    """A vLLM that notes them in another way keeps its own."""
    try:
        from vllm.logprobs import FlatLogprobs
        from vllm.v1.engine.logprobs import LogprobsProcessor

        original = LogprobsProcessor._update_sample_logprobs
    except (ImportError, AttributeError):
        return
    if getattr(original, "_megarl", False) or {each.name for each in fields(FlatLogprobs)} != FLAT:
        return

    def _update_sample_logprobs(self: Any, lists: Any) -> None:
        flat, (tokens, logprobs, ranks) = self.logprobs, lists[:3]
        if not isinstance(flat, FlatLogprobs) or self.tokenizer is not None or logprobs.shape[1] != 1:
            original(self, lists)
            return
        begin, values = len(flat.logprobs), logprobs[:, 0].tolist()
        flat.start_indices.extend(range(begin, begin + len(values)))
        flat.end_indices.extend(range(begin + 1, begin + len(values) + 1))
        flat.token_ids.extend(tokens[:, 0].tolist())
        flat.logprobs.extend(values)
        flat.ranks.extend(ranks.tolist())
        flat.decoded_tokens.extend([None] * len(values))
        for value in values:  # in this order: sum() compensates from Python 3.12 on
            self.cumulative_logprob += value

    _update_sample_logprobs._megarl = True  # type: ignore[attr-defined]
    _update_sample_logprobs._original = original  # type: ignore[attr-defined]
    LogprobsProcessor._update_sample_logprobs = _update_sample_logprobs

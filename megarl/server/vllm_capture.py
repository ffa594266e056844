"""Routes out of vLLM's CPU model runner: drives the AuxOutput connector, which vLLM wires to Model Runner V2 alone.

The connector notes a step's routes request by request, in Python: with 128 requests a tenth of a small model's decode
step. Steps in a row in which the same requests get one token each are therefore handed to it together, as one step of
several tokens, as it takes a chunk of a prompt. Each step's routes still leave with its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)


@dataclass
class _Run:
    """Steps in a row that the connector does not know yet.

    pending: the connector's, of the first step; steps: routes of each, [requests, layers, top-k].
    """

    pending: Any
    steps: list[np.ndarray]
    requests: frozenset[str]

    @property
    def starts(self) -> np.ndarray:
        """Position of each request's next token."""
        return self.pending.token_starts + len(self.steps)

    def last_step(self) -> dict[str, AuxRequestOutput]:
        """As the scheduler takes it."""
        rows, starts = self.steps[-1], (self.starts - 1).tolist()
        return {
            request: AuxRequestOutput(start, rows[number : number + 1])
            for number, (request, start) in enumerate(zip(self.pending.request_ids, starts, strict=True))
        }


class RouteCapture:
    """The connector as the CPU model runner needs it: one begin() and one end() around each step."""

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        """Binds the capture hooks. Must come before warm-up: a compiled graph keeps what was bound as it was traced."""
        self._model, self._config = model, vllm_config
        self._most = vllm_config.scheduler_config.max_num_batched_tokens  # the connector's blocks suffice for these
        self._capturer = RoutedExpertsCapturer(self._most, vllm_config)
        bind_routed_experts_capturer(model, self._capturer)
        self._connector: Any = None
        self._batch: Any = None
        self._run: _Run | None = None

    def connect(self, kv_cache_config: Any) -> None:
        """Makes the connector once the KV cache is laid out. It binds a capturer of its own, which ours then replaces
        again.
        """
        self._connector = get_aux_output_connector(self._model, self._config, kv_cache_config)
        self._connector._capturer = self._capturer
        bind_routed_experts_capturer(self._model, self._capturer)

    def begin(self, scheduler_output: Any) -> None:
        self._batch = None
        metadata = scheduler_output.aux_output_connector_metadata
        if self._connector is None:
            return
        if self._run is not None and not self._same_requests(metadata):
            self._commit()
        if self._run is None or metadata.block_hashes:
            self._connector.begin_step(metadata)

    def _same_requests(self, metadata: Any) -> bool:
        assert self._run is not None
        return (
            metadata is not None
            and metadata.generation == self._connector._generation
            and not metadata.finished_requests
            and metadata.requests.keys() == self._run.requests
        )

    def ran(self, scheduler_output: Any, input_batch: Any) -> None:
        """Notes which rows of the capture belong to which request, between the forward pass and sampling."""
        total = scheduler_output.total_num_scheduled_tokens
        if self._connector is None or not total:
            return
        ids = list(input_batch.req_ids)
        starts = np.arange(len(ids) + 1)
        if total > len(ids):
            starts[1:] = np.cumsum([scheduler_output.num_scheduled_tokens[request] for request in ids])
        self._batch = SimpleNamespace(
            req_ids=ids,
            query_start_loc_np=starts,
            num_computed_tokens_np=input_batch.num_computed_tokens_cpu[: len(ids)].copy(),
        )

    def end(self, output: Any) -> None:
        """Attaches this step's routes to the model runner's output."""
        batch, self._batch = self._batch, None
        if batch is None or output is None:
            return
        one_each = batch.query_start_loc_np[-1] == len(batch.req_ids) == sum(map(len, output.sampled_token_ids))
        if self._run is not None and not (one_each and self._goes_on(batch)):
            self._commit()
        if self._run is not None:
            self._run.steps.append(self._capturer.snapshot_routing_data(len(batch.req_ids)).numpy())
            output.aux_output_connector_output = self._run.last_step()
            return
        begins = one_each and self._all_said(batch)
        pending = self._connector.prepare_output(batch)
        if pending is None:  # on all tensor-parallel ranks but the first
            return
        if begins:
            self._run = _Run(pending, [pending.routed_experts_gpu.numpy()], frozenset(batch.req_ids))
            output.aux_output_connector_output = self._run.last_step()
            return
        sampled = [len(output.sampled_token_ids[output.req_id_to_index[request]]) for request in batch.req_ids]
        pending.enqueue_cpu_copy(np.array(sampled), np.zeros(len(sampled), int))
        output.aux_output_connector_output = pending.process_output()

    def _goes_on(self, batch: Any) -> bool:
        assert self._run is not None
        return (
            batch.req_ids == self._run.pending.request_ids
            and (len(self._run.steps) + 1) * len(batch.req_ids) <= self._most
            and np.array_equal(batch.num_computed_tokens_np, self._run.starts)
        )

    def _all_said(self, batch: Any) -> bool:
        """Whether the routes of every token before this step have left with what was sampled."""
        states = [self._connector._requests.get(request) for request in batch.req_ids]
        return all(
            state is not None and state.emit_cursor == state.capture_cursor == start
            for state, start in zip(states, batch.num_computed_tokens_np.tolist(), strict=True)
        )

    def _commit(self) -> None:
        """Hands the steps of the run to the connector: what it keeps for a shared prefix is then whole."""
        run, self._run = self._run, None
        assert run is not None
        steps, requests = len(run.steps), len(run.pending.request_ids)
        run.pending.routed_experts = np.stack(run.steps, axis=1).reshape(-1, *run.steps[0].shape[1:])
        run.pending.query_start_loc = np.arange(requests + 1) * steps
        run.pending.num_sampled = np.full(requests, steps)
        run.pending.num_rejected = np.zeros(requests, int)
        run.pending.process_output()

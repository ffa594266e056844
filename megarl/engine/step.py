"""Passes of packs through Megatron's pipeline schedules: log-probabilities without
gradients, and one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor

from megarl.engine.batch import Pack, cp_rows, router_rows
from megarl.engine.device import to_device, to_host
from megarl.engine.logprob import vocab_parallel_logprobs
from megarl.engine.model import Model
from megarl.engine.optim import current_lr
from megarl.engine.pipeline import StageMessages, schedule_groups
from megarl.replay.context import Replay, replay_schedule

Metrics = dict[str, Tensor]
LossOfPack = Callable[..., tuple[Tensor, Metrics]]  # (pack, logprobs [T], entropy [T]) -> loss, metrics
# no hooks; live routes, recorded; the rollout's replayed (R3), or those of the pi_old pass (R2), live ones recorded too
Routes = Literal["off", "record", "replay", "replay_old"]


class TokenScores(NamedTuple):
    """Float32 [T], of all rows of a pack; 0 where a row predicts no token that is learnt from."""

    logprobs: Tensor
    entropy: Tensor


class UpdateResult(NamedTuple):
    """packs: the metrics of each pack, on the last stage. optimizer: optim/grad_norm and optim/lr of the step."""

    packs: list[Metrics]
    optimizer: dict[str, float]


class LiveRoutes(NamedTuple):
    """Of one chunk and one pack, as megarl.replay.context.Recorded.stacked gives them."""

    routes: Tensor
    score_gap: Tensor | None


class Engine:
    """Runs one model. Every rank calls every method with the same number of packs."""

    def __init__(self, model: Model, temperature: float) -> None:
        self.model = model
        self.temperature = temperature
        self.optimizer: Any = None
        self.scheduler: Any = None
        order = [len([m for m in chunk.decoder.layers if hasattr(m.mlp, "router")]) for chunk in model.bare]
        edges = [sum(order[:i]) for i in range(len(order) + 1)]
        self._layers = [slice(a, b) for a, b in pairwise(edges)]  # of each chunk among this rank's MoE layers
        self._routers = [
            [layer.mlp.router for layer in chunk.decoder.layers if hasattr(layer.mlp, "router")] for chunk in model.bare
        ]
        self._head_rows: Tensor | None = None  # of the pack in hand, as _computed gives them
        for chunk in model.bare:
            if isinstance(getattr(chunk, "output_layer", None), ColumnParallelLinear):
                chunk.output_layer.register_forward_pre_hook(self._take_head_rows)
        # The loss arrives divided by its global denominator, so gradients are only summed: no division by a token
        # count.
        model.config.finalize_model_grads_func = lambda chunks, num_tokens, **kwargs: finalize_model_grads(
            chunks, None, **kwargs
        )

    def set_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler

    def logprobs(self, packs: list[Pack], routes: Routes, temperature: float | None = None) -> list[TokenScores]:
        """log pi and entropy, one a pack, on the last stage (an empty list elsewhere). Unless `routes` is off, live
        routes and score gaps are left in pack.passes.
        """
        return [TokenScores(*output) for output in self.outputs(packs, routes, temperature)]

    @torch.no_grad()
    def outputs(self, packs: list[Pack], routes: Routes, temperature: float | None = None) -> list[Any]:
        """What the head gives for each pack (see `_head`), without
        gradients, on the last stage (an empty list elsewhere).
        """
        for chunk in self.model.chunks:
            chunk.eval()
        result = self._schedule(packs, routes, self._score, forward_only=True, temperature=temperature)
        for chunk in self.model.chunks:
            chunk.train()
        return result

    def update(self, packs: list[Pack], routes: Routes, loss: LossOfPack) -> UpdateResult:
        """One optimizer step over the packs."""
        return UpdateResult(self.gradients(packs, routes, loss), self.step())

    def step(self) -> dict[str, float]:
        """One optimizer step with the gradients there are: optim/grad_norm and optim/lr of it."""
        lr = current_lr(self.optimizer)
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return {"optim/grad_norm": float(grad_norm or 0.0), "optim/lr": lr}

    def finite_gradients(self) -> bool:
        """Whether the norm of this rank's gradients is finite. Clipped by any other they would be 0; unclipped, Adam
        keeps their squares, and a NaN or an infinity there ruins the weights for good.
        """
        buffers = [
            buffer.grad_data for chunk in self.model.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ]
        return bool(torch.stack([torch.linalg.vector_norm(buffer) for buffer in buffers]).isfinite().all())

    def gradients(self, packs: list[Pack], routes: Routes, loss: LossOfPack) -> list[Metrics]:
        """Fills main_grad with the gradient of the sum over all packs
        of all replicas. `loss` is divided by the global denominator.
        """
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._schedule(packs, routes, partial(self._train, loss), forward_only=False)

    def _score(self, pack: Pack, temperature: float, out: Tensor, non_loss_data: bool) -> tuple[Tensor, ...]:
        scores = self._head(pack, out, temperature)
        for held in (out, out._base):  # the schedule keeps the logits until those of the next pack are there
            if held is not None:
                held.data = held.new_empty(1)
        return scores

    def _train(self, loss: LossOfPack, pack: Pack, temperature: float, out: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        value, metrics = loss(pack, *self._head(pack, out, temperature))
        return value, torch.ones((), dtype=torch.int), metrics

    def _head(self, pack: Pack, logits: Tensor, temperature: float) -> tuple[Tensor, ...]:
        """log pi and entropy of all rows of the pack, 0 where a row predicts nothing that is learnt from. logits: this
        rank's [1, rows, columns], of the rows that its output layer has computed.
        """
        parallel, device, computed = self.model.parallel, logits.device, self._head_rows
        labels, mask = self._local(pack.labels, pack.mask)
        group, vocab_size = parallel.tp_group if parallel.layout.tp > 1 else None, self.model.weight_map.vocab_size
        labels = to_device(labels if computed is None else labels[computed], device)
        local: tuple[Tensor, ...] = vocab_parallel_logprobs(logits.squeeze(0), labels, temperature, group, vocab_size)
        if computed is not None:
            computed = to_device(computed, device)
            local = tuple(values.new_zeros(len(mask)).index_copy(0, computed, values) for values in local)
        others = to_device(mask == 0, device)
        return self._whole(pack, *(values.masked_fill(others, 0.0) for values in local))

    def _computed(self, pack: Pack) -> Tensor | None:
        """int64: those of this rank's rows that its output layer computes. They predict a token that is learnt from;
        where none does, it is the first. None with TP, which is all of them: each rank's last layer has a slice of the
        rows, and the whole comes together in the output layer itself.
        """
        if self.model.parallel.layout.tp > 1:
            return None
        (mask,) = self._local(pack.mask)
        rows = mask.nonzero().flatten()
        return rows if len(rows) else torch.zeros(1, dtype=torch.long)

    def _local(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Of all rows of a pack those that this rank computes."""
        layout, coord = self.model.parallel.layout, self.model.parallel.coord
        if layout.cp == 1:
            return values
        rows = cp_rows(len(values[0]), layout.cp, coord.cp)
        return tuple(each[rows] for each in values)

    def _take_head_rows(self, layer: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before the output layer: of hidden states [rows, 1, H] those that it computes."""
        if self._head_rows is None:
            return None
        hidden, *others = given
        return (hidden.index_select(0, to_device(self._head_rows, hidden.device)), *others)

    def _whole(self, pack: Pack, *local: Tensor) -> tuple[Tensor, ...]:
        """This rank's rows -> all rows of the pack [T], in order. Under
        CP each rank computes its own; the loss is of whole responses.
        """
        parallel = self.model.parallel
        if parallel.layout.cp == 1:
            return local
        rows = torch.cat([cp_rows(pack.padded, parallel.layout.cp, rank) for rank in range(parallel.layout.cp)])
        order = to_device(rows.argsort(), local[0].device)
        # Every rank computes the same loss and keeps the gradient of its own rows, so that summing over the ranks
        # counts each row once.
        gathered = gather_from_sequence_parallel_region(
            torch.stack(local, dim=1), tensor_parallel_output_grad=False, group=parallel.cp_group
        )
        return gathered[order].unbind(1)

    def _schedule(
        self,
        packs: list[Pack],
        routes: Routes,
        consume: Callable[..., Any],
        *,
        forward_only: bool,
        temperature: float | None = None,
    ) -> list[Any]:
        recorded: dict[tuple[int, int], LiveRoutes] = {}
        parallel = self.model.parallel
        between: dict[str, Any] = {}
        if parallel.layout.pp > 1:
            messages = StageMessages(
                self.model.config, parallel.layout, parallel.coord, [pack.padded for pack in packs]
            )
            between = {"p2p_communicator": messages, "pg_collection": schedule_groups()}
        recomputes = not forward_only and self.model.config.recompute_granularity is not None
        with replay_schedule(self._routers, recomputes) if routes != "off" else nullcontext() as replay:
            result = get_forward_backward_func()(
                forward_step_func=partial(
                    self._forward, replay, routes, consume, temperature or self.temperature, recorded
                ),
                data_iterator=[iter(enumerate(packs)) for _ in self.model.chunks],
                model=self.model.chunks,
                num_microbatches=len(packs),
                seq_length=max(pack.padded for pack in packs),  # Megatron divides by CP and TP itself
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
                **between,
            )
        if routes != "off":
            self._keep_routes(packs, recorded)
        return result

    def _forward(
        self,
        replay: Replay | None,
        routes: Routes,
        consume: Callable[..., Any],
        temperature: float,
        recorded: dict[tuple[int, int], LiveRoutes],
        data: Iterator[tuple[int, Pack]],
        chunk: Any,
    ) -> tuple[Tensor, Callable[..., Any]]:
        number, pack = next(data)
        index = next(i for i, candidate in enumerate(self.model.chunks) if candidate is chunk)
        device = self.model.parallel.device.device
        context: Any = nullcontext()
        if replay is not None:
            given, has_route = pack.rollout.routes, pack.rollout.has_route
            if routes == "replay_old":
                given, has_route = pack.passes.old_routes, None
            target = None if given is None else to_device(given[:, self._layers[index]], device)
            has_route = None if has_route is None or has_route.all() else to_device(has_route, device)
            context = replay.forward(index, target, has_route, replay=routes in ("replay", "replay_old"))
        tokens, positions = (to_device(rows, device) for rows in self._local(pack.tokens, pack.positions))
        # bf16 logits stay bf16: megatron-core would copy all of them to float32, 20 GB for 32k tokens, and their
        # gradient too.
        half = {"fp32_output": False} if self.model.config.bf16 else {}
        self._head_rows = self._computed(pack)
        with context as record:
            out = chunk(tokens[None], positions[None], None, packed_seq_params=pack.sequences.to(device), **half)
        if record is not None and record.live:
            recorded[index, number] = LiveRoutes(*record.stacked())
        return out, partial(consume, pack, temperature)

    def _keep_routes(self, packs: list[Pack], recorded: dict[tuple[int, int], LiveRoutes]) -> None:
        """A stage without MoE layers keeps routes of no layers, so that sums over stages meet the same rows on each.
        The host waits for the device once a pass.
        """
        weight_map, chunks = self.model.weight_map, range(len(self.model.chunks))
        routes: list[Tensor | None] = []
        gaps: list[Tensor | None] = []
        for i, pack in enumerate(packs):
            live = [recorded[chunk, i] for chunk in chunks if (chunk, i) in recorded]
            if not live and weight_map.moe_layers:
                rows = len(self.predicting_rows(pack))
                live = [LiveRoutes(torch.zeros(rows, 0, weight_map.top_k, dtype=torch.int16), None)]
            gaps_of = [chunk.score_gap for chunk in live if chunk.score_gap is not None]
            routes.append(torch.cat([chunk.routes for chunk in live], dim=1) if live else None)
            gaps.append(torch.cat(gaps_of, dim=1) if gaps_of else None)
        kept = to_host([*routes, *gaps])
        for pack, route, gap in zip(packs, kept, kept[len(packs) :], strict=False):
            if route is not None:
                pack.passes.live_routes, pack.passes.score_gap = route, gap

    def predicting_rows(self, pack: Pack) -> Tensor:
        """bool [rows of this rank]: rows that predict a response token, the ones that routing metrics count."""
        return pack.mask[router_rows(pack.padded, self.model.parallel.layout, self.model.parallel.coord)].bool()

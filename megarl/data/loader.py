"""The cold start's batches, read ahead: shards -> this rank's packs,
their rows already on the device. By a thread of ours, or by DALI.

Both loaders ask one function which demonstrations a step has and which of them are this rank's, so for a seed they give
the same batches.
A plan says it for a step, from lengths alone: no rank reads the tokens of another.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megarl.data.shards import Shards
from megarl.errors import UserError

AHEAD = 2  # batches

LoaderKind = Literal["torch", "dali"]


@dataclass(frozen=True)
class StepPlan:
    """Packs of this rank for one step, as demonstrations; response tokens and tokens of
    the whole step, over all ranks.
    """

    packs: list[list[int]]
    targets: int
    tokens: int


Batch = tuple[StepPlan, list[list[Tensor]]]  # for each pack its demonstrations' tokens, int64, on the device


def batches(
    kind: LoaderKind, plans: Iterator[StepPlan], shards: Shards, device: torch.device, most_packs: int
) -> Iterator[Batch]:
    """In the order of `plans`, read ahead. most_packs: of a step on this rank. Raises UserError where DALI is asked for
    and is not installed.
    """
    return _dali(plans, shards, device, most_packs) if kind == "dali" else _threaded(plans, shards, device)


def _read(plan: StepPlan, shards: Shards) -> list[np.ndarray]:
    """All tokens of a pack in one array, pack by pack."""
    return [np.concatenate([shards.tokens(i) for i in pack]) if pack else np.zeros(0, np.int32) for pack in plan.packs]


def _cut(plan: StepPlan, shards: Shards, flat: list[Tensor]) -> list[list[Tensor]]:
    return [
        list(tokens.split([shards.length(i) for i in pack])) if pack else []
        for pack, tokens in zip(plan.packs, flat, strict=True)
    ]


def _threaded(plans: Iterator[StepPlan], shards: Shards, device: torch.device) -> Iterator[Batch]:
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    stopped = threading.Event()
    pinned = device.type == "cuda"

    def put(item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for plan in plans:
                flat = [torch.from_numpy(tokens).long() for tokens in _read(plan, shards)]
                put((plan, [(x.pin_memory() if pinned else x).to(device, non_blocking=pinned) for x in flat]))
            put(None)
        except BaseException as error:  # raised where the batch is taken
            put(error)

    thread = threading.Thread(target=work, name="data-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            plan, flat = item
            yield plan, _cut(plan, shards, flat)
    finally:
        stopped.set()
        thread.join()


def _dali(plans: Iterator[StepPlan], shards: Shards, device: torch.device, most_packs: int) -> Iterator[Batch]:
    """A DALI batch is a step, a sample the tokens of one pack. Reading,
    the cast and the copy to the device run in DALI's own threads.
    """
    dali = import_dali()
    made: queue.Queue[StepPlan] = queue.Queue()

    def source() -> list[np.ndarray]:
        plan = next(plans)  # StopIteration ends the pipeline
        made.put(plan)
        return [
            np.append(tokens, np.int32(0)) for tokens in _read(plan, shards)
        ]  # DALI has no empty samples: one row more, dropped below

    gpu = device.type == "cuda"
    pipe = dali.Pipeline(
        batch_size=most_packs,
        num_threads=1,
        device_id=device.index if gpu else None,
        prefetch_queue_depth=AHEAD,
        seed=0,
    )
    with pipe:
        tokens = dali.fn.external_source(source=source, dtype=dali.types.INT32, ndim=1, batch=True)
        tokens = dali.fn.cast(tokens.gpu() if gpu else tokens, dtype=dali.types.INT64)
        pipe.set_outputs(tokens)
    pipe.build()
    while True:
        try:
            [out] = pipe.run()
        except StopIteration:
            return
        plan = made.get()
        flat = [
            torch.from_dlpack(out[i]).clone()[:-1] for i in range(len(plan.packs))
        ]  # the pipeline writes over its own memory
        yield plan, _cut(plan, shards, flat)


def import_dali() -> Any:
    try:
        import nvidia.dali as dali
        import nvidia.dali.fn
        import nvidia.dali.types  # noqa: F401
    except ImportError:
        raise UserError(
            "data.loader dali: nvidia-dali is not installed; install the dali extra or set data.loader=torch"
        ) from None
    return dali


def planner(
    order: Callable[[int], list[int]],
    batch: int,
    steps: int,
    shards: Shards,
    local_packs: Callable[[list[int]], list[list[int]]],
) -> Iterator[StepPlan]:
    """order(n): the next n demonstrations. local_packs(rows of a step's
    demonstrations): this rank's packs, as places among them.
    """
    for _ in range(steps):
        chosen = order(batch)
        packs = [[chosen[place] for place in pack] for pack in local_packs([shards.length(i) - 1 for i in chosen])]
        lengths, prompts = sum(map(shards.length, chosen)), sum(map(shards.prompt_len, chosen))
        yield StepPlan(packs, lengths - prompts, lengths)

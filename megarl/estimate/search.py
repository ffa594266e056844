"""`megarl plan --search`: every layout of a model on N GPUs that the engine takes and that fits, ranked by a roofline;
and on how few GPUs it fits at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from megarl.config import Config, ParallelConfig
from megarl.estimate.cluster import kept_by_stage, sync_plan, training_of
from megarl.estimate.memory import (
    FREE,
    GIB,
    RECOMPUTE,
    Held,
    Memory,
    Training,
    held_of,
    layer_kinds,
    one_of_each_kind,
    room,
    stage_memory,
)
from megarl.estimate.roofline import CARDS, Machine, Seconds, Work, assumptions, model_flops, step_seconds
from megarl.estimate.traffic import stage_traffic
from megarl.refusals import layout_refusal
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import WeightMap, load_hf_config

SHOWN, LOOKED_AT = 10, 40  # rows, and of how many a weight sync is planned at most, which takes seconds a layout
OFFLOAD = (0.0, 1.0)  # of the optimizer
PACKS = (1, 2, 4)  # micro-batches to try, in lengths of the longest response
MOST_CP, MOST_PP, MOST_VPP = 8, 64, 8
MOST_GPUS, STEPS = 4096, 32  # of the fewest that fit; how many counts between one power of two and the next


@dataclass(frozen=True)
class Found:
    """memory: of the fullest stage. packs: of a replica in a mini-batch."""

    parallel: dict[str, int | None]
    recompute: str
    tokens: int
    memory: Memory
    seconds: Seconds
    tokens_per_s: float
    mfu: float
    offload: float = 0.0

    @property
    def overrides(self) -> list[str]:
        """All that was rated, so that nothing of it is left to the configuration that they are given with."""
        layout = [f"parallel.{key}={'null' if value is None else value}" for key, value in self.parallel.items()]
        return [
            *layout,
            f"engine.recompute={self.recompute}",
            f"engine.micro_batch_tokens={self.tokens}",
            "engine.distributed_optimizer=true",
            f"engine.optimizer_offload_fraction={self.offload:g}",
        ]


class Cuts:
    """What the ranks of a stage hold, for any layout: layers of a kind are alike, so each is looked at once."""

    def __init__(self, weight_map: WeightMap) -> None:
        self.weight_map = weight_map
        self._known: dict[tuple[int, int, int], dict[str, Held]] = {}

    @cached_property
    def _small(self) -> WeightMap:
        """The model with one layer of each kind."""
        layers = one_of_each_kind(self.weight_map)
        return WeightMap({**self.weight_map.hf_config, "num_hidden_layers": layers})

    def stage(self, layout: Layout, stage: int) -> Held:
        parts = self._parts(layout)
        held = Held()
        for chunk in range(layout.vpp):
            for moe, count in layer_kinds(self.weight_map, layout, stage, chunk).items():
                held = held.plus(parts["moe" if moe else "dense"].times(count))
        if stage == 0:
            held = held.plus(parts["first"])
        if stage == layout.pp - 1:
            held = held.plus(parts["last"])
            if layout.pp > 1:
                held = held.plus(parts["copy"])
        return held

    def _parts(self, layout: Layout) -> dict[str, Held]:
        key = (layout.tp, layout.ep, layout.etp)
        if key not in self._known:
            self._known[key] = self._measure(Layout(tp=layout.tp, ep=layout.ep, etp=layout.etp, world=1 << 20))
        return self._known[key]

    def _measure(self, layout: Layout) -> dict[str, Held]:
        small, parts = self._small, {"moe": Held(), "dense": Held(), "first": Held(), "last": Held(), "copy": Held()}
        coord = layout.coord(0)
        for moe in (True, False):
            layers = [i for i in range(small.num_layers) if (i in small.moe_layers) == moe]
            if layers:
                parts["moe" if moe else "dense"] = held_of(small.layer_params(layout, coord, layers[0]))
        for entry in small.entries:
            if entry.where in ("first", "last"):
                place = "copy" if entry.copy else entry.where
                parts[place] = parts[place].plus(held_of(small.params_of(entry, layout, coord)))
        return parts


class Search:
    def __init__(self, config: Config, machine: Machine, rollout_ep: int = 1) -> None:
        self.config, self.machine, self.rollout_ep = config, machine, rollout_ep
        self.weight_map = WeightMap(load_hf_config(config.model.path))
        self.cuts = Cuts(self.weight_map)
        rollout, batch = config.rollout, config.batch
        self.longest = rollout.max_prompt_tokens + rollout.max_new_tokens
        mean = max(1, self.longest // 2)
        self.work = Work(batch.prompts * batch.group * mean, batch.minibatches, mean)
        self.itemsize = 4 if config.engine.dtype == "float32" else 2
        self.offloads = OFFLOAD if self.itemsize == 2 else OFFLOAD[:1]  # as refusals/work.py has it
        self.tried = 0

    def fitting(self, world: int) -> list[Found]:
        """All that fit on `world` GPUs, the fastest first; of the kinds of recompute the least that fits, and with the
        optimizer in host memory only where that spares some.
        """
        found = [self._rate(*case) for case in self._cases(world, self.offloads)]
        return sorted(found, key=lambda one: -one.tokens_per_s)

    def shown(self, found: list[Found], world: int) -> list[Found]:
        """The first of them, with the messages that a weight sync keeps, which are left out of what is tried."""
        kept: dict[Layout, list[int]] = {}
        rows: list[Found] = []
        for one in found:
            layout = Layout(**one.parallel, world=world)  # type: ignore[arg-type]
            if layout not in kept:
                if len(kept) == LOOKED_AT:
                    break
                plan = sync_plan(self.config, layout, self.weight_map, self.rollout_ep)
                kept[layout] = kept_by_stage(self.config, plan)
            memory = self._with_sync(self._training(layout, one.recompute, one.tokens, one.offload), kept[layout])
            if memory.total <= room(self.machine.card.memory):
                rows.append(replace(one, memory=memory))
            if len(rows) == SHOWN:
                break
        return rows

    def _with_sync(self, training: Training, kept: list[int]) -> Memory:
        every = (
            replace(stage_memory(self.weight_map, training, stage, self.cuts.stage(training.layout, stage)), sync=size)
            for stage, size in enumerate(kept)
        )
        return max(every, key=lambda one: one.total)

    def _training(self, layout: Layout, recompute: str, tokens: int, offload: float) -> Training:
        base = training_of(self.config, layout, self.itemsize)
        return replace(base, distributed_optimizer=True, recompute=recompute, tokens=tokens, offload=offload)

    def fits(self, world: int, offload: float = 0.0) -> bool:
        return offload in self.offloads and next(self._cases(world, (offload,)), None) is not None

    def _cases(self, world: int, offloads: tuple[float, ...]) -> Iterator[tuple[Training, Memory, list[Held]]]:
        limit = room(self.machine.card.memory)
        for layout in self._layouts(world):
            self.tried += len(PACKS) * len(offloads)
            held = [self.cuts.stage(layout, stage) for stage in range(layout.pp)]
            if max(_least(self.itemsize, one) for one in held) > limit:
                continue
            stages = _telling_stages(held)
            for times in PACKS:
                tries = len(RECOMPUTE)
                for offload in offloads:
                    for place, recompute in enumerate(RECOMPUTE[:tries]):
                        training = self._training(layout, recompute, times * self.longest, offload)
                        memory = self._fullest(training, stages, held)
                        if memory.total <= limit:
                            yield training, memory, held
                            tries = place
                            break

    def _fullest(self, training: Training, stages: list[int], held: list[Held]) -> Memory:
        every = (stage_memory(self.weight_map, training, stage, held[stage]) for stage in stages)
        return max(every, key=lambda one: one.total)

    def _layouts(self, world: int) -> Iterator[Layout]:
        """Those that the engine takes, and that the batch can feed."""
        for layout in self._sizes(world):
            sizes = {key: value for key, value in vars(layout).items() if key != "world"}
            parallel = ParallelConfig.model_construct(**sizes)
            if layout_refusal(self.config, parallel, world, self.weight_map) is None:
                yield layout

    def _sizes(self, world: int) -> Iterator[Layout]:
        model, inside = self.weight_map.model, self.machine.gpus
        experts, layers = self.weight_map.num_experts, self.weight_map.num_layers
        for tp in _divisors(model["num_query_groups"], inside):
            for cp in [n for n in (1, 2, 4, 8) if n <= MOST_CP]:
                for pp in _divisors(world, min(MOST_PP, layers)):
                    for vpp, ends in _cuts_of(layers, pp):
                        for ep in _divisors(experts, experts) if experts else [1]:
                            for etp in _divisors(tp, tp) if experts else [1]:
                                yield Layout(tp, pp, vpp, ep, etp, cp, ends, ends, world)

    def _rate(self, training: Training, memory: Memory, held: list[Held]) -> Found:
        layout = training.layout
        stages = {
            stage: (held[stage], stage_traffic(self.weight_map, training, stage, held[stage]))
            for stage in _telling_stages(held)
        }
        seconds = step_seconds(self.weight_map, training, stages, self.work, self.machine)
        flops = model_flops(self.weight_map, self.work.tokens, self.work.sequence)
        sizes = {key: value for key, value in asdict(layout).items() if key != "world"}
        mfu = flops / (seconds.total * layout.world * self.machine.card.peak)
        speed = self.work.tokens / seconds.total
        return Found(sizes, training.recompute, training.tokens, memory, seconds, speed, mfu, training.offload)

    def fewest(self, offload: float = 0.0) -> int | None:
        """GPUs on which something fits, of the divisors of a host and then whole hosts; None if not on MOST_GPUS. By
        doubling, and then upwards from the half: more hosts do not always fit (a prime number is hardly cut), so that
        bisecting could miss some.
        """
        gpus = self.machine.gpus
        for count in _divisors(gpus, gpus):
            if self.fits(count, offload):
                return count
        low = gpus
        while 2 * low <= MOST_GPUS and not self.fits(2 * low, offload):
            low *= 2
        step = gpus * max(1, low // gpus // STEPS)
        counts = range(low + step, min(2 * low, MOST_GPUS) + 1, step)
        return next((count for count in counts if self.fits(count, offload)), None)


def _least(itemsize: int, held: Held) -> int:
    """Bytes that no other setting takes away: parameters and gradients."""
    return (held.dense + held.expert) * (itemsize + 4)


def _telling_stages(held: list[Held]) -> list[int]:
    """The first, which holds most packs, the last, which holds the logits, and the fullest of the others."""
    between = range(1, len(held) - 1)
    fullest = [max(between, key=lambda stage: held[stage].dense + held[stage].expert)] if between else []
    return sorted({0, len(held) - 1, *fullest})


def _divisors(count: int, most: int) -> list[int]:
    return [n for n in range(1, min(count, most) + 1) if count % n == 0]


def _cuts_of(layers: int, pp: int) -> Iterator[tuple[int, int | None]]:
    """(virtual stages, layers of the first and of the last stage where shares cannot be even)."""
    if layers % pp == 0:
        yield from ((vpp, None) for vpp in _divisors(layers // pp, MOST_VPP if pp > 1 else 1))
        return
    even = layers / pp
    ends = [n for n in range(1, layers // 2) if pp > 2 and (layers - 2 * n) > 0 and (layers - 2 * n) % (pp - 2) == 0]
    if ends:
        yield 1, min(ends, key=lambda n: (abs(n - even), n))


def run(config: Config, world: int, rollout_ep: int, machine: Machine, as_json: bool) -> int:
    """0 where some layout fits, 1 where none does."""
    search = Search(config, machine, rollout_ep)
    fewest, hosted = search.fewest(), search.fewest(offload=1.0)
    search.tried = 0
    found = search.fitting(world)
    shown = search.shown(found, world)
    if any(not one.offload for one in found):  # a number between those that fewest() tries
        fewest = min(fewest or world, world)
    if found:
        hosted = min(hosted or world, world)
    if as_json:
        few = {"fewest_gpus": fewest, "fewest_gpus_offloaded": hosted}
        rows = [asdict(one) | {"overrides": one.overrides, "total": one.memory.total} for one in shown]
        print(json.dumps({"tried": search.tried, "fit": len(found), **few, "best": rows}))
    else:
        print(describe(search, world, len(found), shown, fewest, hosted))
    return 0 if shown else 1


def machine_of(gpu_gib: float, gpus: int, link_gbs: float) -> Machine:
    """Rates are those of the smallest card that holds as much, or of the largest."""
    cards = sorted(CARDS.values(), key=lambda card: card.memory)
    like = next((card for card in cards if gpu_gib <= 1.03 * card.memory / GIB), cards[-1])
    return Machine(replace(like, memory=gpu_gib * GIB), gpus, link_gbs * 1e9)


def describe(
    search: Search, world: int, fitting: int, shown: list[Found], fewest: int | None, hosted: int | None
) -> str:
    lines = [
        f"{world:,} GPUs of {search.machine.card.memory / GIB:g} GiB, of which {FREE:.0%} stay free; optimizer "
        f"sharded: {fitting:,} of {search.tried:,} layouts with their micro-batches fit, the optimizer on the "
        "card or in host memory; GiB: at the worst moment of the fullest stage, a checkpoint or a weight sync among "
        "them (the sync's messages are planned for the rows below alone)"
    ]
    lines += [
        "",
        "ranked by arithmetic, not by measurement:",
        *[f"  {a}" for a in assumptions(search.machine, search.work)],
    ]
    parts = tuple(Seconds.__dataclass_fields__)
    lines += [
        "",
        f"{'tokens/s a GPU':>14} {'MFU':>5} {'GiB':>6} " + " ".join(f"{p[:9]:>9}" for p in parts) + "  layout",
    ]
    for one in shown:
        shares = " ".join(f"{getattr(one.seconds, p) / one.seconds.total:>9.0%}" for p in parts)
        lines.append(
            f"{one.tokens_per_s / world:>14,.0f} {one.mfu:>5.1%} {one.memory.total / GIB:>6.1f} {shares}  "
            f"{' '.join(one.overrides)}"
            + (f" ({one.memory.host / GIB:,.0f} GiB of host memory)" if one.memory.host else "")
        )
    if fitting and not shown:
        lines.append(f"none, of the first {LOOKED_AT} layouts, once a weight sync's messages are counted")
    few, host = (f"fits on {count:,} GPUs" if count else f"does not fit on {MOST_GPUS:,}" for count in (fewest, hosted))
    lines += [
        "",
        f"on how few GPUs: {few}, with the optimizer in host memory (engine.optimizer_offload_fraction=1) {host}, "
        f"where each micro-batch is at least {search.longest:,} tokens long",
    ]
    return "\n".join(lines)

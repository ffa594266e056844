"""What a resumed run may change: its settings against run.dir/config.yaml, before any process starts.

A run that goes on from a checkpoint under other settings than it was begun with is another experiment under the same
name. So what changes nothing that is learnt is taken, and all else, keys of a later release included, is refused by
name, unless run.resume=force says that it is meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megarl.checkpoints import damage, newest, no_sound, state_of, step_of, whole_checkpoints
from megarl.config import Config, decay_iters
from megarl.data.stream import CONTENT, content_digest
from megarl.errors import UserError
from megarl.refusals.case import Case

# keys and sections (with a dot at the end) that a resumed run may change -> what of; docs/checkpoints.md has the table
MAY_CHANGE = {
    "train.steps": "how long the run is",
    "train.on_bad_batch": "what a bad batch does",
    "train.mismatch_guard": "what a batch out of line does",
    "train.stop_on_dull_steps": "when a run gives up",
    "replay.metrics": "what is measured",
    "replay.on_missing": "what a missing route does",
    "parallel.": "where the model's parts lie",
    "engine.recompute": "memory against time",
    "engine.micro_batch_tokens": "memory against time",
    "engine.distributed_optimizer": "memory against time",
    "engine.optimizer_offload_fraction": "memory against time",
    "engine.experts": "the same product, by another kernel",
    "engine.transformer_impl": "the same layers, by other kernels",
    "engine.deterministic": "the same operations, by other kernels",
    "rollout.engines": "how many servers there are",
    "rollout.tp": "how a server is cut",
    "rollout.max_num_seqs": "memory against time",
    "rollout.enforce_eager": "memory against time",
    "rollout.kv_cache_gib": "memory",
    "rollout.gpu_memory_utilization": "memory",
    "rollout.batch_invariant": "the same operations, by other kernels",
    "rollout.start_timeout_s": "a time limit",
    "rollout.request_timeout_s": "a time limit",
    "sync.transport": "how weights travel",
    "sync.staged": "how weights travel",
    "sync.digests": "what is checked",
    "sync.timeout_s": "a time limit",
    "sync.canary_tolerance": "what is checked",
    "data.prompts": "its name; its content must be the same",
    "data.reward_workers": "how rewards are run",
    "data.reward_timeout_s": "a time limit",
    "data.on_bad_line": "what a bad line does",
    "data.loader": "a cold start's alone",
    "eval.": "what is measured",
    "run.": "where the run lies, what it keeps and shows; not run.seed",
    "launch.": "where it runs",
    "sft.": "a cold start's alone",
    "score.": "of another command",
}
COUNTS_YET = ("run.seed",)
SHOWN = 4  # differences that are named; the rest is counted


def settings(case: Case) -> str | None:
    """A run that goes on, under settings that change what it learns."""
    run_dir = Path(case.config.run.dir)
    whole = whole_checkpoints(run_dir / "checkpoints")
    last = newest(run_dir / "checkpoints")
    if last is None and whole:
        return no_sound(whole[-1], damage(whole[-1]) or "")
    if last is None or case.config.run.resume == "force" or step_of(last) >= case.config.train.steps:
        return None
    changed = _changed(run_dir / "config.yaml", case)
    content = state_of(last).get("stream", {}).get(CONTENT)
    if content and content != content_digest(case.config.data.prompts):
        changed.append(f"data.prompts {case.config.data.prompts!r} holds other rows than before")
    if not changed:
        return None
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return (
        f"run.dir {case.config.run.dir!r} goes on from step {step_of(last)}, which was reached under other settings: "
        f"{'; '.join(changed[:SHOWN])}{more}. Set them back, or give another run.dir, or run.resume=force to go on so"
    )


def _changed(saved: Path, case: Case) -> list[str]:
    """Every key that counts and has another value than in the saved config.yaml, with both values."""
    try:
        text = saved.read_text("utf-8") if saved.is_file() else ""
        if not text.strip():  # a release that wrote it in place left it empty where the disk was full
            return []
        old, new = yaml.safe_load(text), case.config.model_dump(mode="json")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{str(saved)!r} cannot be read ({reason}); move it away to go on unchecked") from None
    old, new = old if isinstance(old, dict) else {}, dict(new)
    if not case.model.get("num_moe_experts"):  # the run has turned replay off itself
        old.pop("replay", None), new.pop("replay", None)
    before, now, default = (_flat(tree) for tree in (old, new, Config().model_dump(mode="json")))
    before |= {key: value for key, value in default.items() if key not in before}  # keys of a later release
    texts = [
        f"{key} {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value and _counts(key) and not key.startswith("train.lr_decay")
    ]
    return texts + _decay(before, now)


def _decay(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The decay of the learning rate, which an unset train.lr_decay_iters stretches with train.steps."""
    old, new = (_decay_of(flat) for flat in (before, now))
    if old == new:
        return []
    if old[0] != new[0]:
        return [f"train.lr_decay_style {old[0]!r}, now {new[0]!r}"]
    return [
        f"train.lr_decay_iters {old[1]}, now {new[1]} with train.steps {now['train.steps']} (set "
        f"train.lr_decay_iters={old[1]} to keep the schedule)"
    ]


def _decay_of(flat: dict[str, Any]) -> tuple[str, int | None]:
    style, steps = flat["train.lr_decay_style"], flat["train.steps"] * flat["batch.minibatches"]
    given, warmup = flat["train.lr_decay_iters"], flat["train.lr_warmup_iters"]
    return style, None if style == "constant" else decay_iters(given, steps, warmup)


def _counts(key: str) -> bool:
    free = any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)
    return key in COUNTS_YET or not free


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

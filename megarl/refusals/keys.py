"""Which keys each command reads. One YAML file serves all commands, so keys of others may stand in it; an override on
the command line is meant for this command, and one that it would ignore is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import yaml

from megarl.config import Config, walk
from megarl.errors import UserError

# A word is a section or a key; one with a minus takes back what a section before it gave.
ENGINE = "model parallel engine run.dir run.seed launch.trainers launch.interface"
SERVERS = """
    model rollout -rollout.max_lag -rollout.in_flight engine.dtype replay.mode replay.metrics batch.minibatches
    data.on_bad_line data.columns data.reward data.thinking_tags data.pass_threshold data.reward_workers
    data.reward_timeout_s data.reward_env sync.quantize run.dir run.seed
    launch.store launch.rollout_python launch.interface
"""
TRAINING = "model parallel engine replay objective batch rollout sync data -data.loader eval train critic run launch"
READS = {
    "run": TRAINING,
    "train": TRAINING,
    "rollout": TRAINING,  # one command line for both sides: a worker is told what the trainers are told
    "sft": f"{ENGINE} train -train.on_bad_batch sft data.on_bad_line data.columns data.loader data.shuffle"
    " rollout.max_prompt_tokens rollout.max_new_tokens rollout.stop_token_ids run.loggers",
    "score": f"{ENGINE} -engine.distributed_optimizer -engine.optimizer_offload_fraction score replay.mode"
    " batch.minibatches",
    "generate": f"{SERVERS} batch.group",
    "eval": f"{SERVERS} -rollout.temperature eval.prompts eval.samples eval.temperature eval.max_prompts",
    "compare": f"{ENGINE} -engine.distributed_optimizer -engine.optimizer_offload_fraction {SERVERS} sync batch"
    " -batch.equal_groups -batch.max_refills replay data.prompts objective.is_cap train.on_bad_batch",
    "plan": "model parallel engine rollout.engines rollout.tp rollout.dtype rollout.max_prompt_tokens"
    " rollout.max_new_tokens rollout.max_lag batch.prompts batch.group batch.minibatches replay objective"
    " sync.transport launch.trainers",
}


# keys (a section with a dot: all of its keys), when they are read, and the setting that it takes
NEEDS: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    (
        "critic.",
        lambda config: config.objective.advantage == "gae",
        "objective.advantage gae, as of objective=ppo",
    ),
    (
        "eval.every eval.samples eval.temperature eval.max_prompts",
        lambda config: config.eval.prompts is not None,
        "eval.prompts",
    ),
    ("batch.max_refills", lambda config: config.batch.equal_groups == "refill", "batch.equal_groups=refill"),
    ("data.overlong_penalty", lambda config: config.data.overlong_buffer > 0, "data.overlong_buffer above 0"),
    (
        "train.min_lr train.lr_decay_iters",
        lambda config: config.train.lr_decay_style != "constant",
        "a train.lr_decay_style other than constant",
    ),
    ("rollout.in_flight", lambda config: config.rollout.max_lag > 0, "a rollout.max_lag above 0"),
    ("sync.quantize_also", lambda config: config.sync.quantize != "none", "a sync.quantize other than none"),
)


def reads(command: str, key: str) -> bool:
    """Whether `command` reads `key`, a dotted name; a section's name alone counts as any of its keys."""
    section = key.partition(".")[0]
    words = READS[command].split()
    if f"-{key}" in words:
        return False
    return key in words or section in words or (key == section and any(word.startswith(f"{key}.") for word in words))


def refuse_ignored(command: str, config: Config, overrides: list[str]) -> None:
    """Raises UserError for the first override, key=value, that `command` would ignore. config: with the overrides."""
    for item in overrides:
        key, _, text = item.partition("=")
        for given in _keys(key, text):
            if not reads(command, given):
                others = [name for name in READS if name not in ("train", "rollout") and reads(name, given)]
                raise UserError(
                    f"override {item!r}: megarl {command} does not read {given}, megarl {' and '.join(others)} does; "
                    "leave it out (in CONFIG it may stay)"
                )
            for keys, is_read, setting in NEEDS:
                is_given = any(given == key or (key.endswith(".") and given.startswith(key)) for key in keys.split())
                if is_given and not is_read(config):
                    raise UserError(
                        f"override {item!r}: {given} is read only with {setting}; set that too, or leave it out"
                    )


def _keys(key: str, text: str) -> list[str]:
    """The dotted names that one override sets: batch={group: 2} is batch.group."""
    if key in Config.model_fields and isinstance(tree := yaml.safe_load(text or "null"), dict):
        return [f"{key}.{name}" for name in tree]
    return [key]


def all_keys() -> list[str]:
    objective = Config.model_fields["objective"].annotation
    names = [name for name, _, _ in walk() if name != "objective"]
    return [*names, "objective", *(f"objective.{name}" for name in objective.model_fields)]  # type: ignore[union-attr]

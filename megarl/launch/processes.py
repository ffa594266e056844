"""What a command starts on this host: torchrun with its ranks, and the
rollout workers, as full command lines with their environment.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megarl.addresses import set_interface
from megarl.config import Config
from megarl.errors import UserError
from megarl.launch.gpus import VISIBLE, gpu_names, has_gpu
from megarl.launch.malloc import huge_pages
from megarl.launch.ports import reserve_port
from megarl.launch.supervisor import Process

WITH_ROLLOUTS = ("run", "generate", "eval", "compare")
WITHOUT_ENGINE = ("generate", "eval")  # one rank talks to the rollout workers
STOP_MARGIN_S = 5.0
ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}  # for the trainers; vLLM brings its own
WRITES_RUN = ("run", "train", "sft")  # the others only read, and leave a run's logs alone


@dataclass(frozen=True)
class Plan:
    """The trainer ranks (under torchrun) and the rollout workers that serve them. stop_s: how long the ranks may take
    to end by themselves after a signal. max_restarts: of a rollout worker; trainer_restarts: of the ranks. store: where
    workers that others start find the run, if that was drawn here.
    """

    trainer: Process
    rollouts: list[Process]
    log_dir: Path
    ranks: int
    stop_s: float = 0.0
    max_restarts: int = 0
    trainer_restarts: int = 0
    store: str = ""


def describe(plan: Plan, config: Config, command: str) -> str:
    """What would start: the layout, the sizes of a step, every process as a line that a shell would run."""
    parallel, batch, responses = config.parallel, config.batch, config.batch.prompts * config.batch.group
    lines = [f"{command}: {plan.trainer.name}, {len(plan.rollouts)} rollout worker(s), run.dir {config.run.dir}"]
    if command not in WITHOUT_ENGINE:
        dp = plan.ranks // (parallel.tp * parallel.pp * parallel.cp)
        sizes = ", ".join(f"{name} {size}" for name, size in parallel.model_dump(exclude_none=True).items())
        lines.append(f"layout: {sizes}, dp {dp}, sequence parallelism {'on' if parallel.tp > 1 else 'off'}")
        if command in ("run", "train"):
            groups, share = batch.prompts // batch.minibatches, -(-responses // batch.minibatches // dp)
            lines.append(
                f"step: {batch.prompts} prompts x {batch.group} responses = {responses}, replay {config.replay_mode}"
            )
            lines.append(
                f"update: {batch.minibatches} mini-batch(es) of {groups} groups, at most {share} responses a "
                "data-parallel rank"
            )
    for process in [plan.trainer, *plan.rollouts]:
        words = [f"{key}={shlex.quote(value)}" for key, value in sorted(process.env.items())]
        lines += ["", f"{process.name}, log {process.log}:", "  " + " ".join([*words, shlex.join(process.argv)])]
    return "\n".join(lines)


def ranks_of(command: str, config: Config) -> int:
    """Local trainer ranks `command` starts."""
    return 1 if command in WITHOUT_ENGINE else config.launch.trainers


def log_dir_of(command: str, config: Config) -> Path:
    return Path(config.run.dir) / ("logs" if command in WRITES_RUN else f"logs.{command}")


def make_plan(command: str, module: str, config: Config, arguments: list[str], options: list[str] = []) -> Plan:
    """Plans `command`, whose ranks run `module`.main. `arguments` are CONFIG and its overrides, passed on; `options`
    follow them for the ranks.
    """
    host, _, port = config.launch.store.rpartition(":")
    arguments, store = list(arguments), ""
    if port == "0" and command in (*WITH_ROLLOUTS, "train"):  # not by rank 0: workers know it after a restart too
        store = f"{host}:{reserve_port(host)}"
        arguments.append(f"launch.store={store}")
    if config.launch.colocate and command != "run":
        arguments.append("launch.colocate=false")  # the others have no turns to take
    max_restarts = config.launch.max_restarts
    if command != "run" or config.launch.colocate:  # the others wait for no second worker; a shared GPU has no room
        max_restarts = 0
        arguments += ["launch.max_restarts=0"] if command in WITH_ROLLOUTS else []
    log_dir = log_dir_of(command, config)
    ranks = ranks_of(command, config)
    engines = config.rollout.engines if command in WITH_ROLLOUTS else 0
    colocated = config.launch.colocate and command == "run"
    # a rank without an engine computes nothing; what it sees tells it the precision of the others
    own = 0 if command in WITHOUT_ENGINE else ranks
    gpus = _gpus(ranks if colocated else own + engines * config.rollout.tp)
    for_rollouts = gpus if colocated else gpus[own:]
    env = _environment(config, host)
    torchrun = [sys.executable, "-m", "megarl.launch.torchrun", str(log_dir), f"--nproc-per-node={ranks}"]
    torchrun += [
        "--master-addr=127.0.0.1",
        f"--master-port={reserve_port('127.0.0.1')}",
        "-m",
        "megarl.launch.rank",
        str(log_dir),
    ]
    trainer = Process(
        name=f"trainer ({ranks} rank{'s' if ranks > 1 else ''})",
        argv=[*torchrun, module, *arguments, *options],
        log=log_dir / "torchrun.log",
        env={**env, **_visible(gpus[:ranks]), **({} if gpus else ON_CPU | huge_pages()), "PYTHONWARNINGS": "ignore"},
        stdout_to_terminal=True,
    )
    rollouts = [
        Process(
            name=f"rollout worker {i}",
            argv=[config.launch.rollout_python or sys.executable, "-m", "megarl", "rollout", *arguments]
            + ["--log-dir", str(log_dir)],
            log=log_dir / f"worker_{i}.log",
            env={**env, **_visible(for_rollouts[i * config.rollout.tp :][: config.rollout.tp])},
        )
        for i in range(engines)
    ]
    # the ranks know the limit themselves, and say that they passed it
    resumes = command in ("run", "train")
    stop_s = config.run.preempt_s + STOP_MARGIN_S if resumes else 0.0
    restarts = config.launch.max_restarts if resumes else 0
    apart = store if command == "train" else ""
    return Plan(trainer, rollouts, log_dir, ranks, stop_s, max_restarts, restarts, apart)


def _environment(config: Config, host: str) -> dict[str, str]:
    env = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return env | set_interface(config.launch.interface, host)


def _gpus(needed: int) -> list[str]:
    """The GPUs of this host, trainer ranks first, then the rollout workers; empty on a CPU."""
    if not has_gpu():
        return []
    gpus = gpu_names()
    if needed > len(gpus):
        raise UserError(
            f"trainer ranks and rollout workers need {needed} GPUs, this host has {len(gpus)}; lower launch.trainers "
            "or rollout.engines"
        )
    return gpus


def _visible(gpus: list[str]) -> dict[str, str]:
    return {VISIBLE: ",".join(gpus)} if gpus else {}

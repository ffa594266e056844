"""Refusals of what a configuration points at: data, reward, loggers, the run's folder and its store."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Literal

from megarl.addresses import resolve
from megarl.checkpoints import NAME, STATE
from megarl.errors import UserError
from megarl.folders import refuse_output, standing, takes_files
from megarl.refusals.case import Case


def _file(key: str, path: str | None, what: str) -> str | None:
    if not path:
        return f"{key} is empty; give {what}, one JSON object a line"
    if not Path(path).exists():
        return f"{key} {path!r} does not exist; give {what}, one JSON object a line"
    if not Path(path).is_dir() and Path(path).stat().st_size == 0:
        return f"{key} {path!r} is an empty file; give {what}, one JSON object a line"
    return None


def prompts(case: Case) -> str | None:
    path = case.config.data.prompts
    # one CONFIG is for all commands: rows of another shape are read by the keys that are known; compare needs no answer
    trains = case.command in ("run", "train")
    return _file("data.prompts", path, "a file of prompts") or _rows(
        case, path, "prompts", needs_answer=trains, all_columns=trains
    )


def prompts_to_answer(case: Case) -> str | None:
    """Those of `generate`, which need no answers."""
    from megarl.data.prompts import check_rows

    check_rows(case.config, case.config.data.prompts, "prompts", needs_answer=False)  # raises UserError
    return None


def eval_prompts(case: Case) -> str | None:
    path = case.config.eval.prompts
    if path is None:
        return "eval.prompts is unset; give a file of prompts with answers" if case.command == "eval" else None
    return _file("eval.prompts", path, "a file of prompts, or leave it unset") or _rows(case, path, "prompts")


def demonstrations(case: Case) -> str | None:
    path = case.config.sft.data
    return _file("sft.data", path, "a file of demonstrations") or _rows(case, path, "demonstrations")


def _rows(
    case: Case,
    path: str,
    kind: Literal["prompts", "demonstrations"],
    *,
    needs_answer: bool = True,
    all_columns: bool = False,
) -> str | None:
    from megarl.data.prompts import check_rows

    # raises UserError, naming the line
    check_rows(case.config, path, kind, needs_answer=needs_answer, all_columns=all_columns)
    return None


def reward(case: Case) -> str | None:
    """Raises UserError, naming the reward, where it does not exist or fails on the first prompt."""
    from megarl.data.prompts import first_prompt
    from megarl.reward import FAST, RewardInput, get_reward
    from megarl.reward.pool import try_reward

    data = case.config.data
    path = case.config.eval.prompts if case.command == "eval" else data.prompts
    if "." not in data.reward:
        get_reward(data.reward)
    if data.reward in FAST or not path or os.environ.get("RANK", "0") != "0":
        return None  # nothing can fail, there is nothing to try it on, or rank 0 tries it
    first = first_prompt(case.config, path)
    if first is None:
        return None  # compare takes rows without answers
    row, prompt, answer = first
    sample = RewardInput(answer, answer, prompt, row=row, tokens=range(8), prompt_tokens=range(8))
    try:
        try_reward(data, sample)
    except UserError as error:
        return f"{error} (tried with the first row of {path}, its answer as the response)"
    return None


def loggers(case: Case) -> str | None:
    from megarl.observe.loggers import find_logger

    for name in case.config.run.loggers:
        find_logger(name)  # raises UserError, naming the logger
    return None


def run_dir(case: Case) -> str | None:
    path = Path(case.config.run.dir)
    if not case.config.run.dir:
        return "run.dir is empty; give a folder, e.g. run.dir=runs/first"
    there = path if path.exists() or path.is_symlink() else standing(path)
    if not there.exists():
        return f"run.dir {str(path)!r}: {str(there)!r} is a link that leads nowhere; mend it or give another folder"
    if not there.is_dir():
        return f"run.dir {str(path)!r}: {str(there)!r} is a file; give a folder"
    if not takes_files(there):
        return (
            f"run.dir {str(path)!r}: nothing can be written to {str(there)!r}; change its permissions or give another "
            "folder"
        )
    return None


FOLDERS, WRITTEN = ("checkpoints", "rollouts", "tensorboard"), ("config.yaml", "metrics.jsonl", "trace.json")
LOGS = ("torchrun.log", "worker_*.log", "trainer_*.log", "rollout_*.log", "failures.jsonl", "pulse")
RECORD = {"sync", "critic", "sft", "score"}  # sections of every config.yaml that a run wrote


def run_dir_of_another(case: Case) -> str | None:
    """What a run would move, remove or write over in its folder must be a run's."""
    folder = Path(case.config.run.dir)
    for name in (*FOLDERS, *WRITTEN):
        wrong, right = ("file", "folder") if name in FOLDERS else ("folder", "file")
        if (folder / name).exists() and (folder / name).is_dir() == (wrong == "folder"):
            return f"run.dir {str(folder)!r} holds a {wrong} {name}, where a run has a {right}; move it away"
    for logs in (folder / "logs", folder / "logs.previous"):
        if logs.is_dir() and any(logs.iterdir()) and not any(any(logs.glob(name)) for name in LOGS):
            return f"run.dir {str(folder)!r} holds a folder {logs.name} that is not a run's; give another folder"
    for checkpoint in sorted(folder.glob("checkpoints/step_*")):
        if NAME.match(checkpoint.name) and not (checkpoint / STATE).is_file():
            return (
                f"run.dir {str(folder)!r}: checkpoints/{checkpoint.name} is no checkpoint of a run, it has no {STATE}; "
                "move it away"
            )
    record = folder / "config.yaml"
    text = record.read_text(encoding="utf-8", errors="replace") if record.is_file() else ""
    if text.strip() and not RECORD <= {line.partition(":")[0] for line in text.splitlines()}:
        return (
            f"run.dir {str(folder)!r} holds a config.yaml that is not a run's record and would be written over; rename "
            "it or give another folder"
        )
    return None


def sft_out(case: Case) -> str | None:
    out = case.config.sft.out
    if out:
        refuse_output("sft.out", Path(out))  # raises UserError
        return None
    out = str(Path(case.config.run.dir) / "hf")
    if Path(out).exists():
        return f"sft.out is unset and {out!r} already exists; remove it, or give sft.out or another run.dir"
    return None


def store(case: Case) -> str | None:
    store = case.config.launch.store
    host, colon, port = store.rpartition(":")
    if ":" in host:
        return f"launch.store {store!r} is an IPv6 address, which is not supported; give a host's name or IPv4 address"
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        return f"launch.store {store!r} is not host:port; e.g. launch.store=127.0.0.1:29600"
    if port == "0" and case.command == "rollout":
        return f"launch.store {store!r}: give the port at which the trainers opened it; `megarl train` prints it"
    if case.command == "rollout" or int(os.environ.get("RANK", "0")) != 0:
        return None  # joins a store that another process owns
    try:
        address = resolve(host, case.config.launch.interface)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, int(port)))
    except socket.gaierror as error:
        if case.command == "train":
            return None  # the name of a pod may come later
        return f"launch.store {store!r}: {host!r} is no host's name here ({error.strerror})"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"launch.store {store!r}: the port is in use; give another, or port 0 to let megarl run pick one"
        here = socket.gethostname()
        return (
            f"launch.store {store!r}: rank 0 cannot listen there ({os.strerror(error.errno or 0)}): give an "
            f"address of this host, e.g. {here}:{port}, or let torchrun start rank 0 on {host} (--node-rank 0)"
        )
    return None

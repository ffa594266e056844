"""The arguments of every command, the same on its command line as in the ranks that it starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

at_home = os.path.expanduser  # a shell leaves --out=~/x as it is


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megarl: error: {message}; see {self.prog} --help\n")


@dataclass(frozen=True)
class Command:
    """help: one line of `megarl --help`. add_arguments: tells a parser what the command takes."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def parse(command: str, argv: list[str]) -> argparse.Namespace:
    """The arguments of one command. Exits with status 2 and one line where they are wrong."""
    parser = Parser(prog=f"megarl {command}", description=COMMANDS[command].help)
    COMMANDS[command].add_arguments(parser)
    return parser.parse_intermixed_args(argv, argparse.Namespace(command=command))


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="override a key, e.g. train.lr=1e-5"
    )


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would start, start nothing")


def _rollout_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--log-dir", type=at_home, metavar="DIR", help="folder of the server's log (default run.dir/logs.rollout)"
    )


def _file_arguments(parser: argparse.ArgumentParser) -> None:
    _launch_arguments(parser)
    parser.add_argument("--input", required=True, type=at_home, metavar="JSONL")
    parser.add_argument("--output", required=True, type=at_home, metavar="JSONL")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _launch_arguments(parser)
    parser.add_argument("--output", type=at_home, metavar="JSONL", help="the responses (default run.dir/eval.jsonl)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    _launch_arguments(parser)
    parser.add_argument(
        "--input",
        type=at_home,
        metavar="JSONL",
        help="prompts, all of them; else the first batch.prompts of data.prompts",
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run's folder (run.dir); several are overlaid in one page"
    )
    parser.add_argument(
        "--out",
        type=at_home,
        metavar="FILE",
        help="the page; else report.html in the run's folder, or here if there are several runs",
    )
    parser.add_argument(
        "--svg", type=at_home, metavar="FILE", help="also write the learning curve of the first run as a picture"
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--world", type=int, metavar="N", help="trainer ranks; else launch.trainers")
    parser.add_argument(
        "--rollout-ep", type=int, default=1, metavar="N", help="expert-parallel ranks of an engine (default 1: none)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="run a step of the engine on a simulated GPU instead: memory, waits, bytes"
    )
    parser.add_argument(
        "--search", action="store_true", help="try every layout instead: which fit, ranked by arithmetic"
    )
    parser.add_argument(
        "--out", type=at_home, metavar="FILE", help="of --trace: a page with the chart of memory over the step"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="the rank that --trace runs (default 0)")
    parser.add_argument("--gpu-gib", type=float, default=80.0, metavar="X", help="memory of a GPU (default 80)")
    parser.add_argument("--gpus-per-host", type=int, default=8, metavar="N", help="ranks a host (default 8)")
    parser.add_argument(
        "--link-gbs",
        type=float,
        default=50.0,
        metavar="X",
        help="GB/s of each rank's network link (default 50: 400 Gbit/s)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="also check this configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[])
    parser.add_argument(
        "--for",
        dest="command_for",
        choices=[name for name in COMMANDS if name not in ("report", "doctor")],
        help="the command that CONFIG is for; else sft where sft.data is set and data.prompts is not, or run",
    )


COMMANDS = {
    "run": Command("trainer ranks and rollout workers on this host, supervised", _launch_arguments),
    "train": Command("trainer ranks only; rollout workers join through launch.store", _launch_arguments),
    "rollout": Command("one rollout worker (a vLLM server) that joins a run through launch.store", _rollout_arguments),
    "sft": Command("supervised fine-tuning on demonstrations: the cold start", _launch_arguments),
    "score": Command("log-probabilities, entropy and routes of given tokens, by the training engine", _file_arguments),
    "generate": Command("responses to given prompts, by the rollout engine", _file_arguments),
    "eval": Command("mean@k and pass@k of a model on eval.prompts, and its responses to read", _eval_arguments),
    "compare": Command(
        "the mismatch between the engines before training: generate, then score; a table and a page", _compare_arguments
    ),
    "report": Command("a run's curves as one HTML page, and its learning curve in the terminal", _report_arguments),
    "plan": Command(
        "memory of the ranks, and bytes and seconds of a weight sync, without running anything", _plan_arguments
    ),
    "doctor": Command("versions, device, cores and memory; optionally checks a configuration", _doctor_arguments),
}

"""The command line: `megarl COMMAND CONFIG [key=value ...]`. Nothing heavy is imported before a command is known to be right."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import megarl
from megarl.errors import UserError

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megarl: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 2 for a mistake of the user's, told in one line, 130 after Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"megarl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _run(argv: list[str]) -> int:
    top = _Parser(prog="megarl", description=megarl.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    width = max(map(len, COMMANDS))
    top.epilog = "commands:\n" + "\n".join(f"  {name:{width}}  {text}" for name, (text, _, _) in COMMANDS.items())
    top.epilog += "\n\n`megarl COMMAND --help` tells more; docs/config.md lists the configuration keys."
    top.add_argument("--version", action="version", version=f"megarl {megarl.__version__}")
    top.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    command = top.parse_args(argv[:1]).command
    return COMMANDS[command][2](parse(command, argv[1:]))


def parse(command: str, argv: list[str]) -> argparse.Namespace:
    """The arguments of one command, on its command line as in the ranks that it starts."""
    text, add_arguments, _ = COMMANDS[command]
    parser = _Parser(prog=f"megarl {command}", description=text)
    add_arguments(parser)
    return parser.parse_intermixed_args(argv, argparse.Namespace(command=command))


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override a key, e.g. train.lr=1e-5")


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would start, start nothing")


def _file_arguments(parser: argparse.ArgumentParser) -> None:
    _launch_arguments(parser)
    parser.add_argument("--input", required=True, metavar="JSONL")
    parser.add_argument("--output", required=True, metavar="JSONL")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    _launch_arguments(parser)
    parser.add_argument("--input", metavar="JSONL", help="prompts, all of them; else the first batch.prompts of data.prompts")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder (run.dir); several are overlaid in one page")
    parser.add_argument("--out", metavar="FILE", help="the page; else report.html in the run's folder, or here if there are several runs")
    parser.add_argument("--svg", metavar="FILE", help="also write the learning curve of the first run as a picture")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--world", type=int, metavar="N", help="trainer ranks; else launch.trainers")
    parser.add_argument("--rollout-ep", type=int, default=1, metavar="N", help="expert-parallel ranks of an engine (default 1: none)")
    parser.add_argument("--gpus-per-host", type=int, default=8, metavar="N", help="ranks a host (default 8)")
    parser.add_argument(
        "--link-gbs", type=float, default=50.0, metavar="X", help="GB/s of each rank's network link (default 50: 400 Gbit/s)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="also check this configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[])


def _launch(args: argparse.Namespace) -> int:
    """run, train, sft, score, generate, compare: starts the ranks, or is one where an outer torchrun started us."""
    from megarl.checkpoints import finished
    from megarl.config import load_config
    from megarl.refusals import check

    config = load_config(args.config, args.overrides)
    options = []
    if getattr(args, "input", None) is not None:
        if not os.path.isfile(args.input):
            raise UserError(f"--input {args.input!r} does not exist; give a JSONL file")
        options = ["--input", args.input]
        if args.command == "compare":
            config.data.prompts = args.input
        else:
            options += ["--output", args.output]
    world = os.environ.get("WORLD_SIZE")
    inside_torchrun = world is not None and "RANK" in os.environ
    if inside_torchrun and args.command == "run":
        raise UserError("megarl run starts its own ranks; under torchrun start `megarl train` on every rank and `megarl rollout` beside it")
    from megarl.launch import plan

    check(config, args.command, world_size=int(world) if inside_torchrun and world else plan.ranks_of(args.command, config))
    if inside_torchrun and not args.dry_run:
        return importlib.import_module(plan.MODULES[args.command]).main([args.config, *args.overrides, *options])
    if args.command in ("run", "train") and (line := finished(config)):
        print(line)
        return 0
    planned = plan.make_plan(args.command, config, [args.config, *args.overrides], options)
    if args.dry_run:
        print(plan.describe(planned, config, args.command))
        return 0
    from megarl.launch.local import launch

    return launch(planned, config)


def _rollout(args: argparse.Namespace) -> int:
    from megarl.config import load_config
    from megarl.refusals import check

    config = load_config(args.config, args.overrides)
    check(config, "rollout")
    from megarl.rollout.server import run_rollout

    host, _, port = config.launch.store.rpartition(":")
    return run_rollout(config, host, int(port))


def _report(args: argparse.Namespace) -> int:
    from megarl.report.html import report

    return report(args.runs, svg=args.svg, out=args.out)


def _plan(args: argparse.Namespace) -> int:
    from megarl.config import load_config
    from megarl.refusals import check

    config = load_config(args.config, args.overrides)
    world = config.launch.trainers if args.world is None else args.world
    for name, value in (("--world", world), ("--rollout-ep", args.rollout_ep), ("--gpus-per-host", args.gpus_per_host)):
        if value < 1:
            raise UserError(f"{name} {value} is not a number of ranks; give 1 or more")
    if not args.link_gbs > 0:
        raise UserError(f"--link-gbs {args.link_gbs:g} is not a speed; give GB/s above 0")
    check(config, "plan", world_size=world)
    from megarl.report.plan import Hosts, run

    return run(config, world, args.rollout_ep, Hosts(args.gpus_per_host, args.link_gbs), args.json)


def _doctor(args: argparse.Namespace) -> int:
    from megarl.report.doctor import doctor

    status = doctor()
    if args.config is not None:
        from megarl.config import load_config
        from megarl.refusals import check

        check(load_config(args.config, args.overrides))
        print(f"{args.config}: nothing to refuse")
    return status


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Command]] = {
    "run": ("trainer ranks and rollout workers on this host, supervised", _launch_arguments, _launch),
    "train": ("trainer ranks only; rollout workers join through launch.store", _launch_arguments, _launch),
    "rollout": ("one rollout worker (a vLLM server) that joins a run through launch.store", _config_arguments, _rollout),
    "sft": ("supervised fine-tuning on demonstrations: the cold start", _launch_arguments, _launch),
    "score": ("log-probabilities, entropy and routes of given tokens, by the training engine", _file_arguments, _launch),
    "generate": ("responses to given prompts, by the rollout engine", _file_arguments, _launch),
    "compare": ("the mismatch between the engines before training: generate, then score; a table and a page", _compare_arguments, _launch),
    "report": ("a run's curves as one HTML page, and its learning curve in the terminal", _report_arguments, _report),
    "plan": ("memory of the ranks, and bytes and seconds of a weight sync, without running anything", _plan_arguments, _plan),
    "doctor": ("versions, device, cores and memory; optionally checks a configuration", _doctor_arguments, _doctor),
}

if __name__ == "__main__":
    sys.exit(main())

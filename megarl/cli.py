"""The command line: `megarl COMMAND CONFIG [key=value ...]`. Nothing
heavy is imported before a command is known to be right.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import megarl
from megarl.announce import announce
from megarl.commands.arguments import COMMANDS, Parser, parse
from megarl.errors import Stopped, UserError
from megarl.folders import takes_files

if TYPE_CHECKING:
    from megarl.config import Config

MODULES = {  # what every rank of a command runs: its main(arguments)
    "run": "megarl.train",
    "train": "megarl.train",
    "sft": "megarl.commands.sft",
    "score": "megarl.commands.score",
    "generate": "megarl.commands.generate",
    "eval": "megarl.commands.evaluate",
    "compare": "megarl.commands.compare",
}

RUN_FILES = (("data.prompts", "eval.prompts"), ("metrics.jsonl",))
MOST_RANKS = 1_000_000  # in a plan, which looks at each of them
FILES = {  # the keys of what a command reads, and the files of run.dir that it writes without --output
    "run": RUN_FILES,
    "train": RUN_FILES,
    "sft": (("sft.data",), ("metrics.jsonl",)),
    "eval": (("eval.prompts",), ("eval.jsonl",)),
    "compare": (("data.prompts",), ("compare.jsonl", "compare.json", "compare.html")),
}


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
    except OSError as error:  # a file or a folder that cannot be read, made or written
        if error.filename is None:
            raise
        print(f"megarl: error: {str(error.filename)!r}: {error.strerror}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    top = Parser(prog="megarl", description=megarl.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    width = max(map(len, COMMANDS))
    top.epilog = "commands:\n" + "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    top.epilog += "\n\n`megarl COMMAND --help` tells more; docs/config.md lists the configuration keys."
    top.add_argument("--version", action="version", version=f"megarl {megarl.__version__}")
    top.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    name = top.parse_args(argv[:1]).command
    return RUNNERS[name](parse(name, argv[1:]))


def _config(args: argparse.Namespace) -> Config:
    """The command's configuration; UserError for a key that is unknown, or that the command line gives in vain."""
    from megarl.config import load_config
    from megarl.refusals.keys import refuse_ignored

    config = load_config(args.config, args.overrides)
    refuse_ignored(args.command, config, args.overrides)
    return config


def _launch(args: argparse.Namespace) -> int:
    """run, train, sft, score, generate, eval, compare: starts the ranks, or is one that an outer torchrun started."""
    from megarl.checkpoints import finished, how_to_go_on
    from megarl.refusals import check

    config = _config(args)
    options = _options(args, config)
    if args.command in ("compare", "generate") and args.input is not None:
        config = config.changed(data={"prompts": args.input})
    world = os.environ.get("WORLD_SIZE")
    inside_torchrun = world is not None and "RANK" in os.environ
    if inside_torchrun and args.command == "run":
        raise UserError(
            "megarl run starts its own ranks; under torchrun start `megarl train` on every rank and `megarl rollout` "
            "beside it"
        )
    from megarl.launch import processes

    ranks = int(world) if inside_torchrun and world else processes.ranks_of(args.command, config)

    def checked() -> None:
        check(config, args.command, world_size=ranks)
        if args.command == "score" and os.environ.get("RANK", "0") == "0":
            from megarl.commands.score_input import check_rows
            from megarl.weights.map.weight_map import WeightMap, load_hf_config

            check_rows(Path(args.input), config, WeightMap(load_hf_config(config.model.path)))

    if inside_torchrun and not args.dry_run:
        return _as_rank(args, config, options, checked)
    checked()
    if args.command in ("run", "train") and (line := finished(config)):
        print(line)
        return 0
    with _served_model(args, config) as model:
        arguments = [args.config, *args.overrides, *model]
        planned = processes.make_plan(args.command, MODULES[args.command], config, arguments, options)
        if args.dry_run:
            print(processes.describe(planned, config, args.command))
            return 0
        from megarl.launch.local import launch
        from megarl.launch.lock import InUse
        from megarl.observe.metrics import last_step

        status, ours = 1, args.command in ("run", "train")
        try:
            status = launch(planned, lambda: last_step(config.run.dir))
            return status
        except InUse:
            ours = False
            raise
        finally:
            if ours:
                if status > 128:
                    print(f"megarl: {how_to_go_on(config)}", file=sys.stderr)
                from megarl.report.live import page_of_a_run_that_ended

                page_of_a_run_that_ended(config.run.dir)


def _as_rank(args: argparse.Namespace, config: Config, options: list[str], check: Callable[[], None]) -> int:
    """One rank that an outer torchrun started."""
    from megarl.addresses import host_and_port
    from megarl.checkpoints import how_to_go_on
    from megarl.launch.joined import run_joined
    from megarl.launch.processes import log_dir_of
    from megarl.launch.stop import leave

    def run() -> int:
        return importlib.import_module(MODULES[args.command]).main([args.config, *args.overrides, *options])

    log_dir, store_host = log_dir_of(args.command, config), host_and_port(config.launch.store)[0]
    try:
        return run_joined(log_dir, config.launch.interface, store_host, check, run)
    except Stopped as stopped:
        if os.environ["RANK"] == "0":
            print(f"megarl: {how_to_go_on(config)}", file=sys.stderr)
        leave(128 + stopped.signum)  # without waiting for threads that wait for a server


def _options(args: argparse.Namespace, config: Config) -> list[str]:
    """Files that a command reads and writes, judged, as options for its ranks. Prompts become data.prompts."""
    given, output = getattr(args, "input", None), getattr(args, "output", None)
    if given is not None and not os.path.isfile(given):
        what = "is no file" if os.path.exists(given) else "does not exist"
        raise UserError(f"--input {given!r} {what}; give a JSONL file")
    keys, names = FILES.get(args.command, ((), ()))
    read = {key: attrgetter(key)(config) for key in keys} if given is None else {"the --input": given}
    read["CONFIG"] = args.config
    if output is not None:
        _check_output(output, read)
    for name in names if output is None else ():
        _check_default(os.path.join(config.run.dir, name), args.command, read)
    options = [] if given is None else ["--input", given]
    if args.command == "eval":
        output = output or os.path.join(config.run.dir, "eval.jsonl")
    if output is not None:
        options += ["--output", output]
    return [*options, *(["--json"] if getattr(args, "json", False) else [])]


@contextlib.contextmanager
def _served_model(args: argparse.Namespace, config: Config) -> Iterator[list[str]]:
    """Overrides by which vLLM alone serves the model: a checkpoint of a run is a Hugging Face folder meanwhile."""
    from megarl.checkpoints import is_hf_folder
    from megarl.launch.processes import WITHOUT_ENGINE

    path = Path(config.model.path)
    routes = ["replay.mode=none", "replay.metrics=false"] if args.command == "eval" else []  # nobody looks at them
    if args.command not in WITHOUT_ENGINE or is_hf_folder(path) or args.dry_run:
        yield routes
        return
    from megarl.convert.to_hf import megatron_to_hf
    from megarl.weights.files.hf_folder import SHARD_BYTES

    os.makedirs(config.run.dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.command}_", dir=config.run.dir) as folder:
        announce(f"converting {path}, which vLLM cannot read")
        megatron_to_hf(path, Path(folder) / "model", SHARD_BYTES)
        yield [*routes, f"model.path={folder}/model"]


def _check_output(path: str, read: dict[str, str | None]) -> None:
    """Raises UserError where the file could not be written at the end of all work, or is one that the command reads
    (`read`, by how the user calls it).
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise UserError(f"--output {path!r} is a folder; give a file")
    if not takes_files(Path(folder)):
        raise UserError(f"--output {path!r}: {folder!r} is no folder that can be written to; make it or give another")
    if name := _own_input(path, read):
        raise UserError(f"--output {path!r} is {name}; give another file")


def _check_default(path: str, command: str, read: dict[str, str | None]) -> None:
    """The same of a file that nobody named."""
    if os.path.isdir(path):
        raise UserError(f"{path!r} is a folder, megarl {command} writes a file there; move it or give another run.dir")
    if name := _own_input(path, read):
        raise UserError(f"megarl {command} writes {path!r}, which is {name}; move it or give another run.dir")


def _own_input(path: str, read: dict[str, str | None]) -> str | None:
    """Which of `read` is written over; until it is whole the output lies in PATH.partial (commands/jsonl.py)."""
    written = [file for file in (path, f"{path}.partial") if os.path.exists(file)]
    for name, given in read.items():
        if given and os.path.exists(given) and any(os.path.samefile(file, given) for file in written):
            return name
    return None


def _rollout(args: argparse.Namespace) -> int:
    from megarl.refusals import check

    config = _config(args)
    check(config, "rollout")
    from megarl.server.worker import run_rollout

    host, _, port = config.launch.store.rpartition(":")
    # a folder of its own: `megarl train` may start, and begin its logs anew, while this worker runs
    log_dir = Path(args.log_dir or Path(config.run.dir) / "logs.rollout")
    return run_rollout(config, host, int(port), log_dir)


def _report(args: argparse.Namespace) -> int:
    from megarl.report.html import report

    return report(args.runs, svg=args.svg, out=args.out)


def _plan(args: argparse.Namespace) -> int:
    from megarl.refusals import check

    config = _config(args)
    world = config.launch.trainers if args.world is None else args.world
    counts = {"--world": world, "--rollout-ep": args.rollout_ep, "--gpus-per-host": args.gpus_per_host}
    counts["rollout.engines x rollout.tp"] = config.rollout.engines * config.rollout.tp
    for name, value in counts.items():
        if not 1 <= value <= MOST_RANKS:
            raise UserError(f"{name} {value} is not a number of ranks; give 1 to {MOST_RANKS}")
    if args.trace and args.search:
        raise UserError("--trace and --search are two plans: of this layout, and of all; give one")
    for name, given in (("--out", args.out), ("--rank", args.rank)):
        if given is not None and not args.trace:
            raise UserError(f"{name} {given} is read only with --trace; give that too, or leave it out")
    if not args.link_gbs > 0:
        raise UserError(f"--link-gbs {args.link_gbs:g} is not a speed; give GB/s above 0")
    if not args.gpu_gib > 0:
        raise UserError(f"--gpu-gib {args.gpu_gib:g} is no memory; give GiB above 0")
    if args.search:
        return _search(config, world, args)
    check(config, "plan", world_size=world)
    from megarl.estimate.cluster import Hosts, run
    from megarl.estimate.memory import GIB

    hosts, gpu = Hosts(args.gpus_per_host, args.link_gbs), args.gpu_gib * GIB
    if args.trace:
        rank = args.rank or 0
        if not 0 <= rank < world:
            raise UserError(f"--rank {rank} is no rank of {world}; give 0 to {world - 1}")
        from megarl.simulate import command

        config_of = (args.config, args.overrides)
        return command.run(*config_of, world, rank, args.rollout_ep, hosts, gpu, args.json, args.out)
    return run(config, world, args.rollout_ep, hosts, gpu, args.json)


def _search(config: Config, world: int, args: argparse.Namespace) -> int:
    """The layout of the configuration is not looked at: others are tried."""
    from megarl.config import ParallelConfig
    from megarl.estimate import search
    from megarl.refusals import check

    config.parallel = ParallelConfig()
    check(config, "plan", world_size=world)
    machine = search.machine_of(args.gpu_gib, args.gpus_per_host, args.link_gbs)
    return search.run(config, world, args.rollout_ep, machine, args.json)


def _doctor(args: argparse.Namespace) -> int:
    from megarl.config import load_config
    from megarl.report.doctor import doctor

    other = os.environ.get("ROLLOUT_PYTHON")
    try:
        config = None if args.config is None else load_config(args.config, args.overrides)
    except UserError:
        doctor(other)  # what the machine has is told all the same
        raise
    status = doctor((config and config.launch.rollout_python) or other)
    if config is not None:
        from megarl.refusals import check

        command = args.command_for or ("sft" if config.sft.data and not config.data.prompts else "run")
        check(config, command)
        print(f"{args.config}: nothing to refuse for megarl {command}")
    return status


RUNNERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _launch,
    "train": _launch,
    "rollout": _rollout,
    "sft": _launch,
    "score": _launch,
    "generate": _launch,
    "eval": _launch,
    "compare": _launch,
    "report": _report,
    "plan": _plan,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())

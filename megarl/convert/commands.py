"""The command lines of checkpoints_conversion/. Exit status 2 and one
line for a mistake of the user's, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megarl.convert.to_hf import megatron_to_hf
from megarl.convert.to_megatron import hf_to_megatron
from megarl.errors import UserError
from megarl.weights.map.layout import Layout
from megarl.weights.map.weight_map import load_hf_config

SIZES = ("tp", "pp", "vpp", "ep", "etp")


def _path(text: str) -> Path:
    return Path(text).expanduser()  # a shell leaves --out=~/x as it is


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def hf_to_megatron_main(argv: list[str] | None = None) -> int:
    parser = _Parser(
        prog="hf_to_megatron.py", description="A Hugging Face folder as a Megatron checkpoint that any layout reads."
    )
    parser.add_argument("--hf", required=True, type=_path, metavar="DIR", help="config.json, safetensors and tokenizer")
    _common(parser)
    for name in SIZES:
        parser.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help="cut the files for this layout (default 1)"
        )

    def convert(args: argparse.Namespace) -> None:
        layout = layout_for(load_hf_config(args.hf), **{name: getattr(args, name) for name in SIZES})
        hf_to_megatron(args.hf, args.out, layout, _bytes(args.shard_gib), args.verify)

    return _run(parser, argv, convert)


def megatron_to_hf_main(argv: list[str] | None = None) -> int:
    parser = _Parser(
        prog="megatron_to_hf.py", description="A Megatron checkpoint, of a run or converted, as a Hugging Face folder."
    )
    parser.add_argument(
        "--megatron", required=True, type=_path, metavar="DIR", help="a run's checkpoints/step_N, or a converted one"
    )
    _common(parser)
    return _run(parser, argv, lambda args: megatron_to_hf(args.megatron, args.out, _bytes(args.shard_gib), args.verify))


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, type=_path, metavar="DIR", help="written whole or not at all; a second call goes on"
    )
    parser.add_argument(
        "--shard-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help="largest file, also the step of resuming (default 4)",
    )
    parser.add_argument("--verify", action="store_true", help="read both sides again and compare them bit for bit")


def _bytes(gib: float) -> int:
    if not gib > 0:
        raise UserError(f"--shard-gib {gib} is not above 0; leave it out for 4")
    return int(gib * 2**30)


def _run(parser: argparse.ArgumentParser, argv: list[str] | None, convert: Callable[[argparse.Namespace], None]) -> int:
    args = parser.parse_args(argv)
    try:
        convert(args)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; the same call goes on where it stopped", file=sys.stderr)
        return 130
    print(f"wrote {args.out}")
    return 0


def layout_for(hf_config: dict[str, Any], **sizes: int) -> Layout:
    """The smallest world that has this layout. UserError where a size is below 1 or does not divide the model."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"--{name} {size} is below 1; leave it out for 1")
    from megarl.config import Config, ParallelConfig  # pydantic takes a while, and the other direction needs none
    from megarl.refusals import layouts
    from megarl.refusals.case import Case

    world = math.lcm(sizes["tp"], sizes["etp"] * sizes["ep"]) * sizes["pp"]
    case = Case("convert", Config(parallel=ParallelConfig(**sizes)), world, hf_config)
    for refusal in (layouts.heads, layouts.ffn, layouts.layers, layouts.experts):
        if sentence := refusal(case):
            raise UserError(sentence.replace("parallel.", "--").replace("parallel ", ""))
    return Layout(**sizes, world=world)

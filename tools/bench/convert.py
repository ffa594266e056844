"""Speed and memory of a conversion, beside `cp` of the same files. Prints a table; --json FILE writes the figures.

    python tools/bench/convert.py [--gb 4] [--rounds 3] [--folder DIR] [--json FILE]

A Qwen3-MoE of random bits in bfloat16 (hidden 2048, 32 experts of 768, vocabulary 32,768; as many layers
as --gb, 1e9 bytes, asks for) in safetensors of at most 1 GiB goes to a Megatron checkpoint cut for TP2
PP1 EP2 and back, each by its own command. Every way begins with a quiet disk and ends with an fsync of
what it wrote; seconds are from the start of the process, with the source in the page cache. The ways take
turns; medians, and from fastest to slowest. Peak is the process's largest resident set; "imports" is that
of a process which only loads the command. What came back is compared with the source bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHARD_GIB = 1
LAYOUT = ["--tp", "2", "--ep", "2"]
WAYS = ("cp", "hf_to_megatron", "megatron_to_hf")
FOLDERS = 4  # the source, its copy, the Megatron checkpoint, and what came back


def make_checkpoint(folder: Path, gb: float) -> tuple[int, int]:
    """Writes it; returns the bytes of all tensors and of the largest."""
    import numpy as np

    from megarl.weights.files.hf_folder import ShardedWriter, plan_shards
    from megarl.weights.files.raw_file import Spec
    from megarl.weights.map.weight_map import WeightMap
    from tools.tiny_model import tiny_config

    def specs(layers: int) -> dict[str, Spec]:
        shape = dict(
            hidden=2048, experts=32, top_k=4, moe_intermediate=768, heads=32, kv_heads=4, head_dim=128, vocab_size=32768
        )
        tree = tiny_config("qwen3_moe", layers=layers, dtype="bfloat16", **shape).to_dict()
        (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
        return {name: Spec("bfloat16", shape) for name, shape in WeightMap(tree).hf_shapes.items()}

    folder.mkdir()
    of_one_layer, of_two_layers = (sum(spec.nbytes for spec in specs(layers).values()) for layers in (1, 2))
    tensors = specs(max(1, round((gb * 1e9 - of_one_layer) / (of_two_layers - of_one_layer)) + 1))
    largest = max(spec.nbytes for spec in tensors.values())
    bits = np.random.default_rng(0).integers(0, 2**16, largest // 2 + 4096, np.uint16)
    writer = ShardedWriter(folder, plan_shards(tensors, SHARD_GIB * 2**30))
    for number, (name, spec) in enumerate(tensors.items()):
        start = number % 4096
        writer.write(name, bits[start : start + spec.nbytes // 2].reshape(spec.shape))
    writer.finish()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return sum(spec.nbytes for spec in tensors.values()), largest


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """In a process of its own: a child's peak counts that of the parent it was forked from, so this one stays small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def timed(*command: str, source: Path | None = None, flush: Path | None = None) -> tuple[float, float]:
    """Seconds, and the largest resident set in bytes, of a command; source: a folder that is in the page cache before;
    flush: one whose files are then brought to disk, in the time.
    """
    for file in source.rglob("*") if source else ():
        with contextlib.suppress(IsADirectoryError), file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    for file in flush.rglob("*") if flush else ():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def assert_same(source: Path, back: Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    import numpy as np

    from megarl.weights.files.hf_reader import HfReader
    from megarl.weights.map.weight_map import WeightMap, load_hf_config

    weight_map = WeightMap(load_hf_config(source))
    with HfReader(source) as a, HfReader(back) as b:
        for name in weight_map.hf_shapes:
            if not np.array_equal(a.whole_bits(name), b.whole_bits(name)):
                raise RuntimeError(f"{name} did not come back as it was")


def measure(folder: Path, gb: float, rounds: int) -> dict[str, Any]:
    source, copy, megatron, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    total, largest = apart(make_checkpoint, source, gb)
    scripts, shard = ROOT / "checkpoints_conversion", ["--shard-gib", str(SHARD_GIB)]
    to_megatron, to_hf = ([sys.executable, str(scripts / name)] for name in ("hf_to_megatron.py", "megatron_to_hf.py"))
    samples: dict[str, list[tuple[float, float]]] = {"imports": [], **{way: [] for way in WAYS}}
    for _ in range(rounds):
        samples["imports"].append(timed(sys.executable, "-c", "import megarl.convert.commands"))
        samples["cp"].append(timed("cp", "-r", str(source), str(copy), source=source, flush=copy))
        shutil.rmtree(copy)
        samples["hf_to_megatron"].append(
            timed(*to_megatron, "--hf", str(source), "--out", str(megatron), *LAYOUT, *shard, source=source)
        )
        command = [*to_hf, "--megatron", str(megatron), "--out", str(back), *shard]
        samples["megatron_to_hf"].append(timed(*command, source=megatron))
        apart(assert_same, source, back)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    return {"bytes": total, "largest_tensor": largest, "seconds_and_peak": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder if left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        free = shutil.disk_usage(temporary).free
        if free < FOLDERS * args.gb * 1e9:
            raise SystemExit(
                f"--gb {args.gb} needs {FOLDERS * args.gb:.0f} GB, {temporary} has {free / 1e9:.0f}; give a smaller "
                "--gb"
            )
        figures = measure(Path(temporary), args.gb, args.rounds)
    total = figures["bytes"]
    print(f"{total / 1e9:.2f} GB, largest tensor {figures['largest_tensor'] / 1e6:.0f} MB")
    seconds = {way: [each[0] for each in figures["seconds_and_peak"][way]] for way in WAYS}
    peak = {way: max(each[1] for each in rows) for way, rows in figures["seconds_and_peak"].items()}
    print(
        f"{'':16}{'seconds':>9}{'MB/s':>8}{'of cp':>8}{'from-to':>14}{'peak MB':>9}{'above imports, in largest tensors':>36}"
    )
    for way in WAYS:
        median = statistics.median(seconds[way])
        ratio, span = statistics.median(seconds["cp"]) / median, f"{min(seconds[way]):.1f}-{max(seconds[way]):.1f}"
        above = f"{(peak[way] - peak['imports']) / figures['largest_tensor']:36.2f}" if way != "cp" else ""
        print(f"{way:16}{median:9.1f}{total / 1e6 / median:8.0f}{ratio:8.2f}{span:>14}{peak[way] / 1e6:9.0f}{above}")
    imports = statistics.median(each[0] for each in figures["seconds_and_peak"]["imports"])
    cp, ways = statistics.median(seconds["cp"]), [way for way in WAYS if way != "cp"]
    ratios = ", ".join(f"{way} {cp / (statistics.median(seconds[way]) - imports):.2f} of cp" for way in ways)
    print(f"imports alone {imports:.1f} s, {peak['imports'] / 1e6:.0f} MB; without them {ratios}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

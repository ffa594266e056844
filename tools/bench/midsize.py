"""Forward and backward of a model of about 20M parameters: tokens a
second of megarl over those of transformers on the same cores.

    python tools/bench/midsize.py [--ranks 1] [--pairs 15] [--responses 32] [--json FILE]

The model: a Qwen3-MoE of 8 layers, hidden 192, 32 experts top-4, float32. The batch: responses of log-normal length
(median 48 tokens, sigma 0.6, at most 192). Both take the gradient of the mean log-probability of every token given
those before it, without an optimizer step. megarl runs its packed batch on --ranks data-parallel ranks of one thread;
transformers runs the padded batch, with sdpa, in one process with as many threads, and with the fastest of its own ways
to run experts. The two take turns. Tokens are real ones: no padding counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.pairs import Seconds, interleaved, on_clock, on_cpu  # noqa: E402
from tools.bench.replay import MODELS  # noqa: E402
from tools.ranks import ENVIRONMENT  # noqa: E402
from tools.tiny_model import make_tiny_model  # noqa: E402

AIM = 0.8
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies the weights of four experts for every token: 20 GB here


def lengths(count: int) -> list[int]:
    import numpy as np

    return [int(n) for n in np.clip(48 * np.random.default_rng(0).lognormal(0, 0.6, count), 4, 192)]


def inside(folder: Path, pairs: int, count: int) -> None:
    import torch
    import torch.distributed as dist

    from megarl.config import load_config
    from megarl.engine.batch import assign, make_packs
    from megarl.engine.build import build_engine
    from megarl.engine.parallel import destroy_parallel

    config = load_config(None, [f"model.path={folder / 'model'}"])
    engine = build_engine(config, optimizer_steps=1)
    parallel = engine.model.parallel
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 24, (n,), generator=generator) for n in lengths(count)]
    rows = [len(t) - 1 for t in tokens]
    packs = make_packs(
        assign(rows, parallel.layout.dp, config.engine.micro_batch_tokens)[parallel.coord.dp],
        tokens,
        [1] * count,
        parallel.layout,
        parallel.coord,
    )

    def loss(pack: Any, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = -(logprobs * pack.mask).sum() / sum(rows)
        return value, {"loss": value.detach()}

    total = torch.zeros(1)

    def ours() -> Seconds:
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        total.fill_(sum(float(part["loss"]) for part in engine.gradients(packs, "off", loss)))
        dist.barrier()
        wall, spent = time.perf_counter() - start, torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        dist.all_reduce(spent)
        dist.all_reduce(total)
        return wall, float(spent)

    judge = Transformers(folder / "model", tokens, parallel.layout.world) if parallel.is_main else None

    def theirs() -> Seconds:
        dist.barrier()
        seconds = judge.step() if judge else (0.0, 0.0)
        dist.barrier()
        return seconds

    times = interleaved(ours, theirs, pairs, warm_up=2)
    ours()
    if judge:
        assert abs(float(total) - judge.loss) < 1e-4 * abs(judge.loss), (float(total), judge.loss)
        result = {"tokens": sum(rows), "parameters": judge.parameters, "experts_of_transformers": judge.experts}
        result |= {"clock": on_clock(times), "cpu": on_cpu(times)}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    destroy_parallel()


class Transformers:
    """The same model and tokens as one padded batch."""

    def __init__(self, path: Path, tokens: list[Any], threads: int) -> None:
        import torch
        from transformers import Qwen3MoeForCausalLM

        self.threads = threads
        self.ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        self.mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
        self.loss = 0.0
        seconds = {}
        for experts in EXPERTS:
            self.model = Qwen3MoeForCausalLM.from_pretrained(
                path, attn_implementation="sdpa", experts_implementation=experts
            )
            self.step()
            seconds[experts] = self.step()[1]
        self.experts = min(seconds, key=seconds.__getitem__)
        self.model = Qwen3MoeForCausalLM.from_pretrained(
            path, attn_implementation="sdpa", experts_implementation=self.experts
        )
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def step(self) -> Seconds:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        start, cpu = time.perf_counter(), time.process_time()
        self.model.zero_grad()
        logits = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, self.ids[:, 1:, None]).squeeze(2)
        loss = -(logprobs * self.mask[:, 1:]).sum() / self.mask[:, 1:].sum()
        loss.backward()
        self.loss = float(loss)
        seconds = time.perf_counter() - start, time.process_time() - cpu
        torch.set_num_threads(before)
        return seconds


def launch(folder: Path, ranks: int, pairs: int, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    command += ["--inside", str(folder), "--pairs", str(pairs), "--responses", str(count)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the ranks failed:\n{done.stderr[-3000:]}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def show(result: dict[str, Any], ranks: int) -> None:
    print(
        f"{result['parameters'] / 1e6:.1f}M parameters, {result['tokens']} tokens, {ranks} rank(s); "
        f"transformers with experts {result['experts_of_transformers']!r}, {ranks} thread(s)"
    )
    print(f"{'':10}{'megarl':>14}{'transformers':>16}{'ratio':>9}   95% interval")
    name: Callable[[str], str] = {"clock": "clock", "cpu": "CPU time"}.__getitem__
    for kind in ("clock", "cpu"):
        part = result[kind]
        ours, theirs = (result["tokens"] / part[key] for key in ("first_s", "second_s"))
        low, high = (1 / bound for bound in reversed(part["interval_95"]))
        print(
            f"{name(kind):10}{ours:10.0f} t/s{theirs:12.0f} t/s{1 / part['median_ratio']:9.3f}   [{low:.3f}, "
            f"{high:.3f}]   aim {AIM}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside, args.pairs, args.responses)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "model", **MODELS["mid"])
        result = launch(folder, args.ranks, args.pairs, args.responses)
    show(result, args.ranks)
    if args.json:
        args.json.write_text(json.dumps({"ranks": args.ranks, "aim": AIM, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

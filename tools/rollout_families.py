"""Which families vLLM serves here: generation, routes, and the weight sync's reload under its Hugging Face names.

    python tools/rollout_families.py [--family NAME ...] [--json FILE]

For each family vLLM loads a tiny random checkpoint, generates, is given the tensors of a second checkpoint of the same
shape through the life cycle of a weight sync, and generates again. Log-probabilities and routes are judged by
transformers: the largest |difference| of a log-probability of a response token, before and after, and the share of rows
whose set of experts is the same in every MoE layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_MLA_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from megarl.server.worker_extension import WorkerExtension  # noqa: E402
from tools.tiny_model import FAMILIES, make_tiny_model  # noqa: E402

PROMPT, RESPONSE = 20, 12
MARK = "result: "


class Extension(WorkerExtension):
    def sync_from(self, folder: str) -> None:
        """What the receiver of a weight sync does (megarl/server/weight_receiver.py), from a file."""
        from safetensors.torch import load_file
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        initialize_layerwise_reload(model)
        model.load_weights(iter(load_file(Path(folder) / "model.safetensors").items()))
        finalize_layerwise_reload(model, self.model_runner.model_config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for family in args.family:  # each in a process of its own: vLLM does not start twice in one
        done = subprocess.run([sys.executable, __file__, "--worker", family], capture_output=True, text=True)
        marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        rows[family] = json.loads(marked[0].removeprefix(MARK)) if marked else {"error": done.stderr.strip()[-300:]}
        print(family, json.dumps(rows[family]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in row for row in rows.values()))


def worker(family: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = serve(family, Path(folder))
        except Exception as error:
            row = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    print(f"\n{MARK}{json.dumps(row)}", flush=True)
    return 0


def serve(family: str, folder: Path) -> dict[str, Any]:
    import numpy as np
    from vllm import LLM, SamplingParams

    first, second = (make_tiny_model(folder / str(seed), family, seed=seed, hidden=128) for seed in (0, 1))
    experts = family not in ("qwen3", "qwen3_tied", "llama")
    llm = LLM(
        str(first),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=2**26,
        block_size=32,
        skip_tokenizer_init=True,
        seed=0,
        enable_return_routed_experts=experts,
        worker_cls="megarl.server.cpu_worker.RolloutWorker",
        worker_extension_cls="tools.rollout_families.Extension",
    )
    layers = llm.collective_rpc("moe_layers")[0]
    sampling = SamplingParams(temperature=1.0, max_tokens=RESPONSE, logprobs=0, detokenize=False, ignore_eos=True)
    prompts = [[3 + (7 * i + j * (1 + i)) % 21 for j in range(PROMPT)] for i in range(4)]
    row: dict[str, Any] = {"moe_layers": layers}
    for when, checkpoint in (("loaded", first), ("synced", second)):
        if when == "synced":
            llm.collective_rpc("sync_from", args=(str(second),))
            llm.reset_prefix_cache()
        worst, same = 0.0, []
        for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
            choice = output.outputs[0]
            logprobs, routes = judge(checkpoint, [*output.prompt_token_ids, *choice.token_ids])
            rollout_logprobs = np.array(
                [entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)]
            )
            worst = max(worst, float(np.abs(rollout_logprobs - logprobs[PROMPT - 1 :]).max()))
            if experts:
                captured = np.asarray(choice.routed_experts)
                row["captured_layers"] = captured.shape[1]
                captured = captured if captured.shape[1] == len(layers) else captured[:, layers]
                same.append((np.sort(captured.astype(int), -1) == routes[: len(captured)]).all((1, 2)))
        row |= {f"{when}_max_diff": worst} | (
            {f"{when}_routes_equal": float(np.concatenate(same).mean())} if experts else {}
        )
    return row


def judge(checkpoint: Path, tokens: list[int]) -> tuple[Any, Any]:
    """transformers' log-probabilities [T - 1] of tokens 1.. and,
    sorted, the experts [T - 1, MoE layers, K] of tokens ..T - 2.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    chosen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].sort(-1).values))
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    logprobs = logits.double().log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return logprobs.numpy(), torch.stack(chosen, 1)[:-1].numpy() if chosen else None


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main())

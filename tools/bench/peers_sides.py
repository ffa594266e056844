"""What tools/bench/peers.py measures megarl beside, two ranks under torchrun, an engine of vLLM inside each:

    torchrun --nproc-per-node 2 tools/bench/peers_sides.py trl|trl-mu|plain MODEL TRAIN.jsonl STEPS OUT.jsonl

Rank 0 writes one JSON object a step: seconds of the step, rollout, sync and update (the rest), and what its engine's
log-probabilities are off the trainer's, where the side has both.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS, GROUP, NEW_TOKENS, CONTEXT, LR = 16, 8, 16, 32, 1e-4  # tools/bench/step.py


class Clock:
    """Seconds of one step by part; a line of OUT for each step that ends."""

    def __init__(self, out: Path | None) -> None:
        self.file = out.open("w", encoding="utf-8") if out else None
        self.parts: dict[str, float] = {}
        self.more: dict[str, float] = {}
        self.began = time.perf_counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - began

        return run

    def end(self) -> None:
        now = time.perf_counter()
        step = now - self.began
        if self.file:
            row = {"step": step, **self.parts, "update": step - sum(self.parts.values()), **self.more}
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        self.parts, self.more, self.began = {}, {}, now


def digit_sum(response: str, answer: str) -> float:
    """As megarl's reward of this name."""
    return float(response.strip()[-1:] == answer.strip())


def trl(model: str, rows: list[dict[str, str]], steps: int, clock: Clock, mu: bool, folder: Path) -> None:
    """mu: TRL's default, the engine's log-probabilities correct the update, for a second forward pass."""
    import functools

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_generation

    # As on the other sides; TRL has no key for either. Compiling takes a minute at the start and gains 4% of a rollout;
    # left to itself vLLM takes a float32 model in bfloat16.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [digit_sum(text, right) for text, right in zip(completions, answer, strict=True)]

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            key = "sampling/sampling_logp_difference/max"
            if logs and key in logs:
                clock.more["off"] = float(logs[key])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.end()

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PROMPTS * GROUP // 2,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": torch.float32},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=CONTEXT,
        vllm_importance_sampling_correction=mu,
        use_cpu=True,
        report_to="none",
        logging_steps=1 if mu else steps,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Steps()],
    )
    generation = trainer.vllm_generation
    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner

    def sync() -> None:
        """TRL's own writes tensors in place, which vLLM's CPU build refuses: it has packed them. So vLLM's reload."""
        runner.reload_weights(weights_iterator=generation._iter_named_params())
        generation.llm.reset_prefix_cache()

    generation.sync_weights = clock.timed("sync", sync)
    generation.generate = clock.timed("rollout", generation.generate)
    clock.began = time.perf_counter()
    trainer.train()


def plain(model_path: str, rows: list[dict[str, str]], steps: int, clock: Clock) -> None:
    """What one would write by hand: no check of weights, routes or numbers; mu weighs each token, cut off at 2."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, foreach=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    llm = LLM(
        model=model_path,
        dtype="float32",
        distributed_executor_backend="external_launcher",
        max_model_len=CONTEXT,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        seed=rank,
    )
    sampling = SamplingParams(n=GROUP, max_tokens=NEW_TOKENS, temperature=1.0, logprobs=0)
    worker = llm.llm_engine.model_executor.driver_worker.model_runner

    def sync() -> None:
        worker.reload_weights(weights_iterator=((name, p.data) for name, p in model.named_parameters()))
        llm.reset_prefix_cache()

    generate, sync = clock.timed("rollout", llm.generate), clock.timed("sync", sync)
    clock.began = time.perf_counter()
    for step in range(steps):
        batch = [rows[(step * PROMPTS + rank * PROMPTS // world + i) % len(rows)] for i in range(PROMPTS // world)]
        prompts = [{"prompt_token_ids": tokenizer(row["prompt"])["input_ids"]} for row in batch]
        outputs = generate(prompts, sampling, use_tqdm=False)
        ids, of_mu, mask, rewards = [], [], [], []
        for row, output in zip(batch, outputs, strict=True):
            head = len(output.prompt_token_ids)
            for choice in output.outputs:
                ids.append(torch.tensor([*output.prompt_token_ids, *choice.token_ids]))
                logprobs = [
                    entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)
                ]
                of_mu.append(torch.tensor([0.0] * (head - 1) + logprobs))
                mask.append(torch.tensor([0.0] * (head - 1) + [1.0] * len(logprobs)))
                rewards.append(digit_sum(tokenizer.decode(choice.token_ids, skip_special_tokens=True), row["answer"]))
        padded = torch.nn.utils.rnn.pad_sequence
        tokens, mu, where = (padded(part, batch_first=True) for part in (ids, of_mu, mask))
        present = padded([torch.ones_like(part) for part in ids], batch_first=True)
        groups = torch.tensor(rewards).view(-1, GROUP)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        logits = model(tokens, attention_mask=present).logits[:, :-1]
        pi = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        weight = torch.exp((pi - mu).detach()).clamp(max=2.0)
        ratio = torch.exp(pi - pi.detach())
        count = where.sum()
        dist.all_reduce(count)
        loss = -(weight * ratio * advantages * where).sum() / count
        optimizer.zero_grad()
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad.copy_(part.view_as(p))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.more["off"] = float(((pi - mu).detach().abs() * where).max())
        sync()
        clock.end()


def main() -> None:
    import os

    side, model, data, steps, out = sys.argv[1:]
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    clock = Clock(Path(out) if os.environ["RANK"] == "0" else None)
    if side == "plain":
        plain(model, rows, int(steps), clock)
    else:
        trl(model, rows, int(steps), clock, side == "trl-mu", Path(out).parent / "trl")


if __name__ == "__main__":
    main()

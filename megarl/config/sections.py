"""The sections of a configuration, as typed trees of one level. Every key has a default."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_RESPONSES = 16_384  # to one prompt: vLLM's VLLM_MAX_N_SEQUENCES
MOST_PROMPTS = 2**20  # of a step, which are drawn at its start
MOST_TOKENS = 2**22  # of a pack, and of a prompt or a response
MOST_SEQS = 2**14  # vLLM allocates for each at its start
MOST_LAG = 1024  # figures are kept of each
DType = Literal["auto", "float32", "bfloat16"]
CANARY_TOKENS = 64  # a weight sync is checked by scoring so many
LONGEST_S = 604_800  # of every limit in seconds: a week; the kernel counts a few of them, in ms, in 32 bits


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("path", "prompts", "data", "out", "dir", "rollout_python", check_fields=False)
    @classmethod
    def _home(cls, value: Any) -> Any:
        """A shell leaves run.dir=~/x as it is."""
        return os.path.expanduser(value) if isinstance(value, str) else value


class ModelConfig(Section):
    path: str = Field(
        "",
        description="What the run starts from: a Hugging Face folder, or a run's checkpoints/step_N (of any layout).",
    )
    trust_remote_code: bool = Field(
        False,
        description=(
            "Run Python files of that folder: in trainers where its tokenizer is one of them (Moonlight, Kimi), in "
            "servers what vLLM takes from them."
        ),
    )


class ParallelConfig(Section):
    """Data parallelism is what is left: world size / (tp pp cp). Sequence parallelism is on wherever tp > 1."""

    tp: int = Field(1, ge=1, description="Tensor-parallel size.")
    pp: int = Field(1, ge=1, description="Pipeline-parallel size (stages).")
    vpp: int = Field(
        1, ge=1, description="Model chunks a pipeline stage (interleaved schedule); 1 is the plain 1F1B schedule."
    )
    ep: int = Field(1, ge=1, description="Expert-parallel size.")
    etp: int = Field(1, ge=1, description="Tensor-parallel size inside an expert.")
    cp: int = Field(1, ge=1, description="Context-parallel size.")
    first_stage_layers: int | None = Field(
        None, ge=1, description="Layers of the first pipeline stage, if not an even share (vpp 1 only)."
    )
    last_stage_layers: int | None = Field(
        None, ge=1, description="Layers of the last pipeline stage, if not an even share (vpp 1 only)."
    )


class EngineConfig(Section):
    dtype: DType = Field("auto", description="Training precision; auto is float32 on a CPU and bfloat16 on a GPU.")
    recompute: Literal["none", "selective", "full"] = Field("none", description="Activation recompute.")
    micro_batch_tokens: int = Field(8192, ge=1, le=MOST_TOKENS, description="Token budget of one packed micro-batch.")
    distributed_optimizer: bool = Field(False, description="Shard optimizer state over data-parallel ranks.")
    optimizer_offload_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "Share of the optimizer that lies in host memory and is stepped by the CPU: master weights and moments; "
            "needs engine.distributed_optimizer."
        ),
    )
    experts: Literal["grouped", "sequential"] = Field(
        "grouped", description="All experts in one grouped product, or one after the other."
    )
    transformer_impl: Literal["auto", "transformer_engine", "local"] = Field(
        "auto",
        description=(
            "Layers: Transformer Engine's, or megatron-core's own; auto takes the former on a GPU where it is "
            "installed."
        ),
    )
    deterministic: bool = Field(
        False, description="Deterministic kernels in training, wherever torch has them; slower on a GPU."
    )


class ReplayConfig(Section):
    mode: Literal["none", "R2", "R3"] | None = Field(
        None, description="Routing replay; unset follows batch.minibatches: 1 none, 2 R2, 3 or more R3."
    )
    metrics: bool = Field(True, description="Record routes for the agreement metrics even where nothing is replayed.")
    on_missing: Literal["error", "live"] = Field(
        "error", description="A sample without routes under R3: stop, or route it live."
    )


class BatchConfig(Section):
    prompts: int = Field(16, ge=1, le=MOST_PROMPTS, description="Prompts a step (B), over all data-parallel ranks.")
    group: int = Field(8, ge=1, le=MOST_RESPONSES, description="Responses a prompt (G).")
    minibatches: int = Field(1, ge=1, description="Optimizer steps a rollout (N); 1 is on-policy.")
    equal_groups: Literal["keep", "drop", "refill"] = Field(
        "keep",
        description=(
            "Groups whose rewards are all equal teach nothing: train on them, leave them out, or sample other "
            "prompts instead."
        ),
    )
    max_refills: int = Field(
        2, ge=1, description="equal_groups refill: at most this many further rollouts a step; then as drop."
    )
    mask_truncated: bool = Field(
        False, description="Leave responses that hit rollout.max_new_tokens out of the loss (DAPO's filter)."
    )


class RolloutConfig(Section):
    engines: int = Field(1, ge=1, description="vLLM servers the trainer waits for; `megarl run` starts this many here.")
    tp: int = Field(1, ge=1, description="Tensor-parallel size of each vLLM server.")
    dtype: DType = Field("auto", description="Rollout precision; auto is the training precision.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; all three policies use it.")
    max_prompt_tokens: int = Field(
        1024, ge=1, le=MOST_TOKENS, description="A longer prompt is a bad line (data.on_bad_line)."
    )
    max_new_tokens: int = Field(256, ge=1, le=MOST_TOKENS, description="Longest response in tokens.")
    stop_token_ids: list[int] = Field(
        [],
        description=(
            "Tokens that end a response besides the model's own: eos_token_id of generation_config.json (else of "
            "config.json) and the tokenizer's."
        ),
    )
    max_lag: int = Field(
        0,
        ge=0,
        le=MOST_LAG,
        description=(
            "Largest lag of a response in optimizer steps: those done before its update, less those of the weights of "
            "its oldest token. 0 is lock-step; one step off is batch.minibatches."
        ),
    )
    in_flight: Literal["recompute", "keep", "finish"] = Field(
        "recompute",
        description=(
            "Under max_lag, what a response that is being sampled does at a sync: it goes on with keys and values "
            "computed again, or with its old ones, or it ends before the weights change."
        ),
    )
    max_num_seqs: int = Field(256, ge=1, le=MOST_SEQS, description="Responses one server decodes at the same time.")
    enforce_eager: bool | None = Field(
        None, description="Run vLLM without torch.compile and graphs; unset is true on a CPU, false on a GPU."
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description=(
            "Memory for vLLM's KV cache on a CPU and under launch.colocate, in GiB a GPU; unset is 0.25 on a CPU, and "
            "what the weights of both engines leave of a GPU."
        ),
    )
    quantization: Literal["none", "fp8"] = Field(
        "none", description="fp8: vLLM quantises the weights as it loads them, and again at every sync; needs a GPU."
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="Precision of vLLM's KV cache; auto is rollout.dtype."
    )
    batch_invariant: bool = Field(
        False,
        description=(
            "vLLM's batch-invariant kernels: a token's numbers do not depend on its batch; slower, needs a GPU."
        ),
    )
    gpu_memory_utilization: float = Field(
        0.85, gt=0, le=1, description="vLLM's share of GPU memory, but see rollout.kv_cache_gib."
    )
    start_timeout_s: float = Field(
        300,
        gt=0,
        le=LONGEST_S,
        description="How long the trainer waits for the servers to come up, or for one where none is left: seconds.",
    )
    request_timeout_s: float = Field(
        600, gt=0, le=LONGEST_S, description="How long one batch of rollouts may take, in seconds."
    )


class SyncConfig(Section):
    transport: Literal["reshard", "broadcast"] = Field(
        "reshard",
        description=(
            "How weights reach the rollout workers: slices straight from rank to rank, or full tensors from rank 0."
        ),
    )
    quantize: Literal["none", "fp8_e4m3", "fp8_e5m2", "int8", "int4"] = Field(
        "none",
        description=(
            "Fake quantisation of the weights on the way: weight-only, one scale a row, to study low-precision "
            "rollouts."
        ),
    )
    quantize_also: list[Literal["router", "embeddings"]] = Field(
        [],
        description="Quantise these too; embeddings are the input embedding and lm_head. Norms and biases never are.",
    )
    staged: bool | None = Field(
        None,
        description=(
            "Receive and check everything before anything is loaded, at the cost of a copy; unset is true on a CPU "
            "alone."
        ),
    )
    digests: Literal["first", "every", "off"] = Field(
        "first",
        description=(
            "Which syncs compare digests of the workers' weights with an engine loaded from disk: from an export "
            "where the run does not begin with what vLLM loads."
        ),
    )
    timeout_s: float = Field(
        120, gt=0, le=LONGEST_S, description="Time limit of each step of a weight sync in seconds."
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description=(
            "Largest |log-probability difference| of the canary; unset is 1e-3 in float32, with a median within 1e-4 "
            "or 4 times its usual, in lower precision 0.5, with median and tail within 4 times their usual."
        ),
    )

    @field_validator("digests", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        """YAML reads an unquoted off as false."""
        return "off" if value is False else value


class TrainConfig(Section):
    """Optimizer and schedule: Megatron's names."""

    steps: int = Field(100, ge=1, description="Rollout steps (each holds batch.minibatches optimizer steps).")
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_warmup_iters: int = Field(0, ge=0, description="Linear warm-up, in optimizer steps.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    lr_decay_iters: int | None = Field(None, ge=1, description="Optimizer steps of the decay; unset is the whole run.")
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="Largest gradient norm; 0 is off.")
    on_bad_batch: Literal["stop", "skip"] = Field(
        "stop",
        description=(
            "A NaN or infinite reward, log-probability or gradient, or a reward that fails: stop and name it, or "
            "skip the step."
        ),
    )
    mismatch_guard: float = Field(
        50.0,
        ge=0,
        description=(
            "A batch whose mismatch/kl_k3, or share of routes that differ, is this many times the median of the last "
            "20 is not trained on, and the servers are checked at once; ten in a row end the run; 0 is off."
        ),
    )
    stop_on_dull_steps: int = Field(
        20,
        ge=0,
        description=(
            "Stop, after a checkpoint, where all rewards of this many steps in a row were one value: nothing is left "
            "to learn from. 0 goes on."
        ),
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)


def decay_iters(given: int | None, optimizer_steps: int, warmup: int) -> int:
    """Optimizer steps of the learning rate's decay: train.lr_decay_iters, or the whole run."""
    return given or max(optimizer_steps, warmup + 1)


class CriticConfig(Section):
    """The critic of an objective with advantage gae: a model of its own, from model.path, in the policy's layout."""

    lr: float = Field(1e-5, gt=0, description="Learning rate; the schedule and Adam are those of train.*.")
    warmup_steps: int = Field(0, ge=0, description="Rollout steps at the start in which only the critic is trained.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of GAE.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of GAE.")
    value_clip: float = Field(
        0.2, gt=0, description="How far a value may move from its old one before its loss stops pulling."
    )


class SftConfig(Section):
    """`megarl sft`: the cold start. Optimizer keys are those of train.*; steps here are optimizer steps."""

    data: str = Field("", description="Demonstrations, JSONL: {messages | prompt, response}.")
    out: str = Field("", description="Hugging Face folder to write, which must not exist; unset is run.dir/hf.")
    batch: int = Field(
        64, ge=1, le=MOST_PROMPTS, description="Demonstrations an optimizer step, over all data-parallel ranks."
    )


class RunConfig(Section):
    dir: str = Field("runs/default", description="Everything the run writes lies here.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the order of the prompts and of all sampling.")
    save_every: int = Field(
        0, ge=0, description="Checkpoint every this many steps, and at the end; 0 is only at the end."
    )
    save_every_minutes: float = Field(
        0, ge=0, description="Checkpoint also after the first step that ends so long after the last one; 0 never does."
    )
    keep: int = Field(2, ge=1, description="Whole checkpoints kept; older ones are deleted.")
    resume: Literal["auto", "force"] = Field(
        "auto",
        description=(
            "A run.dir that holds a checkpoint goes on from it: auto refuses settings that change what is learnt "
            "(docs/checkpoints.md), force takes them."
        ),
    )
    preempt_s: float = Field(
        60,
        gt=0,
        le=LONGEST_S,
        description=(
            "After Ctrl-C or SIGTERM: seconds for the running step and a last checkpoint; then the run ends without."
        ),
    )
    rollout_samples: int = Field(
        4, ge=0, description="Responses written to rollouts/ each step, for reading and for the report."
    )
    loggers: list[str] = Field(
        ["tensorboard"],
        description=(
            "Where scalars go besides metrics.jsonl: tensorboard, wandb, mlflow, or a dotted path module.Class."
        ),
    )


class LaunchConfig(Section):
    trainers: int = Field(
        1, ge=1, description="Local ranks that run, train, sft, score, compare start; ignored under an outer torchrun."
    )
    store: str = Field(
        "127.0.0.1:0",
        description=(
            "host:port that rank 0 opens and rollout workers join; port 0 is drawn at the start, and printed where "
            "workers are started apart."
        ),
    )
    rollout_python: str | None = Field(
        None,
        description="Python of the rollout workers, where vLLM lives in an environment of its own; unset is this one.",
    )
    colocate: bool = Field(
        False,
        description=(
            "megarl run on a node of GPUs: trainer and rollouts on the same ones, in turns; rollout.engines x "
            "rollout.tp is then launch.trainers. Run on one GPU."
        ),
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description=(
            "How often in a row what failed is started again, after 1 s, 2 s, ... 30 s: a rollout server that once "
            "answered, by `megarl rollout`; `megarl rollout` itself by `megarl run`; the trainers, from the last "
            "checkpoint, by `megarl run` and `megarl train`; 0 is never, as for rollout workers under launch.colocate "
            "and in generate, eval and compare."
        ),
    )
    stall_s: float = Field(
        1800,
        ge=0,
        le=LONGEST_S,
        description=(
            "Where no rank goes on for so many seconds, all write their stacks to their logs, the missing one is named "
            "and the trainers end; above the longest phase of a step or of the start, the wait for rollouts left out: "
            "that has rollout.request_timeout_s on each of 3 servers. 0 is never."
        ),
    )
    interface: str | None = Field(
        None,
        description=(
            "Network interface of gloo and NCCL on this host; unset is for gloo the one that leads to rank 0's host "
            "(GLOO_SOCKET_IFNAME, where set), and for NCCL what it finds (NCCL_SOCKET_IFNAME, where set)."
        ),
    )


class ScoreConfig(Section):
    temperature: float = Field(1.0, ge=0.01, description="Temperature of the scored log-probabilities.")

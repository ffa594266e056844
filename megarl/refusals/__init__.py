"""What cannot be right, found before any process starts. One table of
small functions; each refusal says the thing, its value and the fix.

A refusal looks at a `Case` and returns its sentence, or None. The order of the table
matters: a later row may rely on what an earlier one refused. Sizes come from config.json
through the family's table (megarl/weights/map/families/), under Megatron's names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megarl.config import Config, ParallelConfig
from megarl.errors import UserError
from megarl.refusals import files, gpu, layouts, model_folder, resume, server, work
from megarl.refusals.case import Case

if TYPE_CHECKING:
    from megarl.weights.map.weight_map import WeightMap

LOOP = ("run", "train")
ENGINE = (*LOOP, "sft", "score", "compare")
ROLLOUT = (*LOOP, "rollout", "generate", "eval", "compare")
ALL = (*ENGINE, "rollout", "generate", "eval")
PLAN = ("plan",)  # looks at config.json and layouts alone

REFUSALS: tuple[tuple[Callable[[Case], str | None], tuple[str, ...]], ...] = (
    (model_folder.model_path, ALL + PLAN),
    (model_folder.megatron_checkpoint, ALL),
    (model_folder.tokenizer, ("sft", *ROLLOUT)),
    (model_folder.chat_template, ("sft", *ROLLOUT)),
    (model_folder.family, ALL + PLAN),
    (model_folder.architecture, ALL + PLAN),
    (model_folder.block_fp8, ROLLOUT),
    (model_folder.deepseek_router, ROLLOUT),
    (model_folder.glm_head_dim, ROLLOUT),
    (model_folder.ends, (*LOOP, "sft", "generate", "eval", "compare")),
    (files.prompts, (*LOOP, "compare")),
    (files.prompts_to_answer, ("generate",)),
    (files.eval_prompts, (*LOOP, "eval")),
    (files.demonstrations, ("sft",)),
    (files.reward, (*LOOP, "compare", "eval")),
    (files.loggers, (*LOOP, "sft")),
    (files.run_dir, ALL),
    (files.run_dir_of_another, (*LOOP, "sft")),
    (files.sft_out, ("sft",)),
    (work.processes, (*ENGINE, "generate", "eval")),
    (resume.settings, LOOP),
    (layouts.world, ENGINE + PLAN),
    (layouts.expert_world, ENGINE + PLAN),
    (layouts.heads, ENGINE + PLAN),
    (layouts.ffn, ENGINE + PLAN),
    (layouts.layers, ENGINE + PLAN),
    (layouts.experts, ENGINE + PLAN),
    (work.objective, (*LOOP, "compare")),
    (work.schedule, (*LOOP, "sft")),
    (work.minibatches, LOOP),
    (work.fed, LOOP),
    (work.optimizer_offload, (*LOOP, "sft", *PLAN)),
    (work.group, LOOP),
    (work.sft_batch, ("sft",)),
    (work.replay, (*LOOP, "score", "compare")),
    (work.quantize, ("generate", "eval")),
    (work.lag, ROLLOUT),
    (work.stall, LOOP),
    (work.lengths, ROLLOUT),
    (work.overlong, LOOP),
    (work.temperature, ROLLOUT),
    (work.evaluation, (*LOOP, "eval")),
    (work.micro_batch, (*LOOP, "compare")),
    (layouts.rollout_tp, ROLLOUT + PLAN),
    (gpu.transformer_engine, ENGINE),
    (gpu.loader, ("sft",)),
    (gpu.rollout_python, ("run", "generate", "eval", "compare")),
    (gpu.colocate, LOOP),
    (gpu.rollout_kernels, ROLLOUT),
    (server.heads_on_a_cpu, ROLLOUT),
    (server.fp8_cache_on_a_cpu, ROLLOUT),
    (server.compiler_on_a_cpu, ROLLOUT),
    (server.kv_cache, ROLLOUT),
    (model_folder.weights, ALL),
    (model_folder.served_weights, ROLLOUT),
    (files.store, ROLLOUT),
)


LAYOUTS = (layouts.world, layouts.expert_world, layouts.heads, layouts.ffn, layouts.layers, layouts.experts, work.fed)


def layout_refusal(config: Config, parallel: ParallelConfig, world_size: int, weight_map: WeightMap) -> str | None:
    """Why a model cannot be cut so over so many trainer ranks, or its batch be divided among them; None where they can.
    config: whose layout is another.
    """
    case = Case("plan", config.model_copy(update={"parallel": parallel}), world_size, weight_map.hf_config)
    case.__dict__["weight_map"] = weight_map  # as cached_property keeps it
    return next((sentence for refusal in LAYOUTS if (sentence := refusal(case))), None)


def check(
    config: Config, command: str = "run", *, world_size: int | None = None, model_config: dict[str, Any] | None = None
) -> None:
    """Raises UserError with the first refusal that holds for `command` (a command of the CLI, see cli.py).

    world_size: trainer ranks; None takes launch.trainers. model_config:
    config.json, already read; None reads it from model.path.
    """
    case = Case(command, config, config.launch.trainers if world_size is None else world_size, model_config)
    for refusal, commands in REFUSALS:
        if command in commands and (sentence := refusal(case)):
            raise UserError(sentence)
    if os.environ.get("RANK", "0") == "0":
        for note in case.notes:
            print(note, flush=True)

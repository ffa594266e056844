"""The model: megatron-core's GPTModel, one chunk a virtual stage, built
from a weight map and filled from a Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megarl.config import Config
from megarl.engine.attention import RowRotary
from megarl.engine.experts import uneven_width
from megarl.engine.parallel import Parallel
from megarl.engine.profile import Profile, choose_profile
from megarl.engine.soundness import check_source
from megarl.engine.specs import layer_specs, profile_settings
from megarl.weights.files.megatron_folder import open_weights
from megarl.weights.map.te_names import transformer_engine_names
from megarl.weights.map.weight_map import Param, WeightMap


@dataclass
class Model:
    """The chunks of this rank. `chunks` are what the schedules run (wrapped), `bare` the GPTModels inside them."""

    config: TransformerConfig
    weight_map: WeightMap
    parallel: Parallel
    profile: Profile
    bare: list[GPTModel]
    chunks: list[Any] = field(default_factory=list)
    source: str = ""  # the folder its weights were read from

    def params(self) -> Iterator[tuple[Param, torch.Tensor]]:
        """Every parameter and persistent buffer of this rank with its entry in the weight map, in the map's order."""
        for param, module, name in self._places:
            yield param, getattr(module, name)

    @cached_property
    def _places(self) -> list[tuple[Param, torch.nn.Module, str]]:
        """Where each one lies. Found once: a model has thousands, and every weight sync asks for all."""
        named = [_named_places(chunk) for chunk in self.bare]
        return [(param, *named[param.chunk][name]) for param, name in self.named_entries()]

    def named_entries(self) -> list[tuple[Param, str]]:
        """Every entry of the weight map that this rank holds, with the parameter's name in the model that was built."""
        entries = list(self.weight_map.params(self.parallel.layout, self.parallel.coord))
        if not self.profile.transformer_engine:
            return [(param, param.name) for param in entries]
        chunks = [[p.name for p in entries if p.chunk == chunk] for chunk in range(len(self.bare))]
        names = [transformer_engine_names(chunk, self.profile.grouped_experts) for chunk in chunks]
        return [(param, names[param.chunk][param.name]) for param in entries]

    def routers(self) -> list[tuple[int, TopKRouter]]:
        """The routers of this rank as (index among the model's MoE layers, router), in global order."""
        order = {layer: i for i, layer in enumerate(self.weight_map.moe_layers)}
        routers = [m for chunk in self.bare for m in chunk.decoder.modules() if isinstance(m, TopKRouter)]
        return sorted(((order[r.layer_number - 1], r) for r in routers), key=lambda pair: pair[0])


def _named_places(chunk: GPTModel) -> dict[str, tuple[torch.nn.Module, str]]:
    """Module and attribute of each parameter, and of each buffer that a checkpoint holds (a router's expert bias)."""
    persistent = chunk.state_dict().keys()
    names = [name for name, _ in chunk.named_parameters()]
    names += [name for name, _ in chunk.named_buffers() if name in persistent]
    paths = {name: name.rpartition(".")[::2] for name in names}
    return {name: (chunk.get_submodule(path), last) for name, (path, last) in paths.items()}


def build_model(
    config: Config,
    weight_map: WeightMap,
    parallel: Parallel,
    head: Callable[[TransformerConfig], torch.nn.Module] | None = None,
) -> Model:
    """GPTModel chunks of this rank, not yet filled and not yet wrapped
    for training. `head` makes another output layer than the usual.
    """
    profile = _profile(config, weight_map, parallel, say=head is None)
    transformer = _transformer_config(config, weight_map, parallel, profile)
    chunks = []
    for chunk in range(parallel.layout.vpp):
        stage = chunk if parallel.layout.vpp > 1 else None
        layers = parallel.layout.stage_layers(weight_map.num_layers, parallel.coord.pp, chunk)
        chunks.append(
            GPTModel(
                config=transformer,
                transformer_layer_spec=layer_specs(
                    profile, transformer, [layer in weight_map.moe_layers for layer in layers]
                ),
                vocab_size=weight_map.padded_vocab(parallel.layout.tp),
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                parallel_output=True,
                share_embeddings_and_output_weights=weight_map.tied,
                vp_stage=stage,
                **weight_map.gpt,
            ).to(parallel.device.device)
        )
    for gpt in chunks:
        if not transformer.multi_latent_attention:
            gpt.rotary_pos_emb = RowRotary(gpt.rotary_pos_emb)
        if head is not None and gpt.post_process:
            gpt.output_layer = head(transformer).to(parallel.device.device)
    model = Model(transformer, weight_map, parallel, profile, bare=chunks)
    _check_against_map(model)
    _mark_parameters(model)
    if transformer.bf16:
        model.chunks = [Float16Module(transformer, chunk) for chunk in chunks]
        for param, tensor in model.params():
            if param.buffer:
                tensor.data = (
                    tensor.data.float()
                )  # Float16Module rounds buffers too: an expert bias would be loaded rounded
    else:
        model.chunks = list(chunks)
    return model


def _profile(config: Config, weight_map: WeightMap, parallel: Parallel, *, say: bool) -> Profile:
    """Of this process and model: experts of a width that our grouped ones cannot take are sequential, which is said."""
    latent = weight_map.model.get("multi_latent_attention", False)
    profile = choose_profile(config.engine, parallel.device, latent=latent)
    if not weight_map.num_experts or profile.transformer_engine or not profile.grouped_experts:
        return profile
    width = weight_map.model["moe_ffn_hidden_size"] // parallel.layout.etp
    itemsize = parallel.device.dtype(config.engine.dtype).itemsize
    uneven = uneven_width(weight_map.model["hidden_size"], width, itemsize)
    if uneven and say and parallel.is_main:
        print(f"model.path: {uneven}: the experts are computed one after the other (engine.experts=sequential)")
    return replace(profile, grouped_experts=False) if uneven else profile


def _mark_parameters(model: Model) -> None:
    """Attributes by which megatron-core decides over which ranks a gradient is reduced and its norm counted.

    tensor_model_parallel is set by megatron-core's own initialisation, which we skip: without it
    the gradient norm would miss shards. allreduce=False sends expert gradients to the expert-DP
    group; megatron-core does so only where EP > 1, but with TP > ETP it is needed at EP = 1 too
    (the tensor-parallel ranks then hold replicas of the experts that saw different tokens).
    """
    layout = model.parallel.layout
    for param, tensor in model.params():
        tensor.tensor_model_parallel = param.split  # type: ignore[attr-defined]
        if param.expert and layout.tp > layout.etp:
            tensor.allreduce = False  # type: ignore[attr-defined]


def load_weights(model: Model, path: str, *, fresh: str = "") -> None:
    """Fills the model from a Hugging Face folder or a Megatron checkpoint
    of any layout: each rank reads only the rectangles it holds.

    Padding rows become zero, and so does the tensor named `fresh`, which the source does not hold.
    """
    model.source = path
    of_the_source = WeightMap(model.weight_map.hf_config) if fresh else model.weight_map
    if not fresh:
        check_source(Path(path), model.parallel.host_group)
    with open_weights(path, of_the_source) as reader, torch.no_grad():
        if not fresh:  # a critic's folder is the policy's, which has been checked
            reader.carried(model.weight_map)  # names what is missing, unknown or of another shape
        for param, tensor in model.params():
            tensor.zero_()
            for piece in param.pieces:
                if piece.hf_name == fresh:
                    continue
                tensor[piece.local.slices].copy_(reader.read(piece))


def wrap_for_training(model: Model, config: Config) -> None:
    """Adds Megatron's gradient buffers. Gradients are summed over
    ranks: the loss arrives divided by the global denominator.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.engine.distributed_optimizer,
    )
    model.chunks = [
        DistributedDataParallel(model.config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(model.chunks)
    ]


def _transformer_config(
    config: Config, weight_map: WeightMap, parallel: Parallel, profile: Profile
) -> TransformerConfig:
    dtype = parallel.device.dtype(config.engine.dtype)
    layout = parallel.layout
    recompute: dict[str, Any] = {}
    if config.engine.recompute == "full":
        recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif config.engine.recompute == "selective":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    latent = weight_map.model.get("multi_latent_attention", False)
    return (MLATransformerConfig if latent else TransformerConfig)(
        **weight_map.model,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # packs differ in length; see pipeline.py
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,  # where a family has an expert bias, it is frozen in RL
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=parallel.device.device.type == "cpu",
        perform_initialization=False,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=False,
        overlap_p2p_comm=False,
        batch_p2p_comm=False,
        barrier_with_L1_time=False,
        deterministic_mode=config.engine.deterministic,
        **profile_settings(profile),
        **recompute,
    )


def _check_against_map(model: Model) -> None:
    """The map and the model must agree on every name and shape: a family's table cannot be silently incomplete."""
    mapped: dict[tuple[int, str], Sequence[int]] = {
        (param.chunk, name): param.shape for param, name in model.named_entries()
    }
    built = {
        (i, name): tuple(getattr(module, last).shape)
        for i, chunk in enumerate(model.bare)
        for name, (module, last) in _named_places(chunk).items()
    }
    if mapped != built:
        wrong = sorted(set(mapped.items()) ^ set(built.items()), key=str)[:3]
        raise RuntimeError(f"weight map and model differ on rank {model.parallel.coord.rank}, first: {wrong}")

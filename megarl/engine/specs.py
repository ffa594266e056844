"""The layers of a model chunk, for the profile of this process:
megatron-core's specs with our attention, norms and experts put in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.engine.attention import PackedCausalAttention
from megarl.engine.experts import GroupedExperts
from megarl.engine.megatron_compat import submodules_of, with_module
from megarl.engine.mla import PackedLatentAttention
from megarl.engine.profile import Profile


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in a Megatron spec. Its weight is marked
    sequence-parallel, so that its gradient is summed over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def layer_specs(profile: Profile, config: TransformerConfig, moe: Iterable[bool]) -> TransformerBlockSubmodules:
    """`moe`: for each layer of the chunk, whether it has experts."""
    if profile.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(
            layer_specs=[_te_layer(profile, config, has) for has in moe], layer_norm=TENorm
        )
    return TransformerBlockSubmodules(
        layer_specs=[_local_layer(profile, config, has) for has in moe], layer_norm=RMSNorm
    )


def profile_settings(profile: Profile) -> dict[str, Any]:
    """Fields of TransformerConfig that follow from the profile."""
    te = profile.transformer_engine
    return dict(
        moe_grouped_gemm=te and profile.grouped_experts,
        moe_permute_fusion=te,
        bias_activation_fusion=te or profile.fused_activation,
        gradient_accumulation_fusion=False,  # by Apex's extension, which no run of megarl has had yet
    )


def _local_layer(profile: Profile, config: TransformerConfig, moe: bool) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    attention = spec.submodules.self_attention.submodules
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.multi_latent_attention:
        spec.submodules.self_attention.module = PackedLatentAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedCausalAttention
    if moe and profile.grouped_experts:
        mlp = submodules_of(spec.submodules.mlp)
        mlp.experts = with_module(mlp.experts, GroupedExperts)
    return spec


def _te_layer(profile: Profile, config: TransformerConfig, moe: bool) -> ModuleSpec:
    """Transformer Engine cuts each sequence over context-parallel ranks, we cut the pack: there our attention stays."""
    from megarl.engine.te_attention import TePackedAttention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if moe else None,
        moe_grouped_gemm=profile.grouped_experts,
        qk_layernorm=config.qk_layernorm,
    )
    has_cp = config.context_parallel_size > 1
    spec.submodules.self_attention.submodules.core_attention = PackedCausalAttention if has_cp else TePackedAttention
    return spec

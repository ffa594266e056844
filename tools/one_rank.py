"""A world of one rank and single modules of megatron-core in it, for benchmarks and tests of one layer."""

from __future__ import annotations

from typing import Any

from megarl.config import ParallelConfig
from megarl.engine.device import setup_device
from megarl.engine.megatron_compat import submodules_of
from megarl.engine.parallel import Parallel, init_parallel


def one_rank() -> Parallel:
    """megarl.engine.parallel.destroy_parallel() ends it."""
    return init_parallel(ParallelConfig(), setup_device(), seed=0)


def expert_layer(kind: Any, experts: int, hidden: int, width: int, **changes: Any) -> Any:
    """The experts of one MoE layer, gated SiLU; `kind` is SequentialMLP or a subclass. Needs one_rank()."""
    import torch.nn.functional as F
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1,
        num_moe_experts=experts,
        moe_ffn_hidden_size=width,
        ffn_hidden_size=3 * width,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        **changes,
    )
    experts_spec = submodules_of(get_moe_module_spec(use_te=False, num_experts=experts)).experts
    submodules = submodules_of(experts_spec)
    return kind(experts, config, submodules, pg_collection=get_default_pg_collection())

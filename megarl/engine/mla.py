"""Multi-head latent attention (DeepSeek-V2/V3) over packed sequences, for layer specs without Transformer Engine.

megatron-core's own local MLASelfAttention cannot serve here, for three reasons, each held by a test
(tests/unit/test_families.py,
tests/parallel/test_equality.py):
1. It splits the down projections over TP and takes the gradient of the gathered rotary key from this rank's heads alone
   (multi_latent_attention.py: gather_from_tensor_model_parallel_region has no reduction
   in its backward): wrong for TP > 1. Here the down projections are whole on every rank,
   as Transformer Engine's spec has them, and see this rank's sequence-parallel rows.
2. It rotates packed rows by their place in the pack. Here by their position in their sequence, which travels with the
pack: a module's
   attribute would hold the positions of a later micro-batch when a layer is recomputed.
3. It gives the norms of the latents the epsilon of the layers; the models' own code leaves them at 1e-6.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megarl.engine.attention import PackedSequences
from megarl.engine.megatron_compat import pairs_of_latent_rotation

LATENT_EPSILON = 1e-6  # transformers/models/deepseek_v3/modeling_deepseek_v3.py: DeepseekV3RMSNorm's default


class _WholeLinear(torch.nn.Linear):
    """Without bias, the same on every tensor-parallel rank; its
    gradient is summed over them, since each sees rows of its own.
    """

    def __init__(self, config: MLATransformerConfig, outputs: int) -> None:
        super().__init__(config.hidden_size, outputs, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedLatentAttention(MultiLatentAttention):
    """Parameters, their names and their order of heads are those of
    megatron-core's MLASelfAttention with Transformer Engine.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,  # newer releases give it; only their settings by layer name ask for it
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, groups)

        def up(name: str, inputs: int, head_width: int) -> torch.nn.Module:
            return build_module(
                getattr(submodules, name),
                inputs,
                config.num_attention_heads * head_width,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_group=groups.tp,
            )

        def norm(name: str, width: int) -> torch.nn.Module:
            return build_module(getattr(submodules, name), config=config, hidden_size=width, eps=LATENT_EPSILON)

        if config.q_lora_rank is None:
            self.linear_q_proj = up("linear_q_proj", config.hidden_size, self.q_head_dim)
        else:
            self.linear_q_down_proj = _WholeLinear(config, config.q_lora_rank)
            self.q_layernorm = norm("q_layernorm", config.q_lora_rank)
            self.linear_q_up_proj = up("linear_q_up_proj", config.q_lora_rank, self.q_head_dim)
        self.linear_kv_down_proj = _WholeLinear(config, config.kv_lora_rank + config.qk_pos_emb_head_dim)
        self.kv_layernorm = norm("kv_layernorm", config.kv_lora_rank)
        self.linear_kv_up_proj = up("linear_kv_up_proj", config.kv_lora_rank, config.qk_head_dim + config.v_head_dim)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Any,
        position_ids: Any,
        packed_seq_params: PackedSequences,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """hidden_states [T / TP, 1, H] -> query and key [T, 1, heads /
        TP, qk width], value [T, 1, heads / TP, v width].

        T are this context-parallel rank's rows. The compressed tensors, which only inference caches, are None.
        """
        config = self.config
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        latent, rotary_key = self.linear_kv_down_proj(hidden_states).split(
            [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
        )
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        if config.sequence_parallel:
            # backward: the sum over the ranks, each of which has the gradient of its own heads
            rotary_key = gather_from_sequence_parallel_region(
                rotary_key, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        heads = self.num_attention_heads_per_partition
        query = query.unflatten(-1, (heads, self.q_head_dim))
        plain_query, rotary_query = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        plain_key, value = key_value.unflatten(-1, (heads, -1)).split([config.qk_head_dim, config.v_head_dim], dim=-1)
        rotary_query, rotary_key = self._rotate((rotary_query, rotary_key.unsqueeze(2)), packed_seq_params)
        query = torch.cat([plain_query, rotary_query], dim=-1)
        key = torch.cat([plain_key, rotary_key.expand(-1, -1, heads, -1)], dim=-1)
        return query, key, value, None, None

    def _rotate(self, both: tuple[Tensor, Tensor], packed: PackedSequences) -> list[Tensor]:
        angles = self.rotary_pos_emb.get_emb(packed.max_seqlen_q)
        angles, scale = angles if isinstance(angles, tuple) else (angles, 1.0)  # yarn scales cosine and sine
        angles, group, pairs = angles[packed.positions], self.pg_collection.cp, pairs_of_latent_rotation()
        return [
            apply_rotary_pos_emb(x, angles, config=self.config, mscale=scale, cp_group=group, **pairs) for x in both
        ]

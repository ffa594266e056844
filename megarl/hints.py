"""Which key a user meant: for a name that the configuration does not know, by meaning first, then by spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

# key: names that it has in TRL, verl, slime, OpenRLHF, Megatron-LM, vLLM or transformers
NAMES = """
model.path: model model_name model_path model_name_or_path hf_checkpoint pretrain checkpoint actor_model
parallel.tp: tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size tensor_parallelism
parallel.pp: pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size stages
parallel.vpp: vpp_size virtual_pipeline_parallel_size virtual_pipeline_model_parallel_size
parallel.ep: ep_size expert_parallel expert_parallel_size expert_model_parallel_size
parallel.etp: etp_size expert_tensor_parallel_size
parallel.cp: cp_size context_parallel context_parallel_size sequence_parallel_size ulysses_sp_size
engine.dtype: precision torch_dtype params_dtype bf16 fp16
engine.recompute: gradient_checkpointing activation_checkpointing recompute_granularity
engine.micro_batch_tokens: micro_batch_size micro_train_batch_size max_tokens_per_gpu ppo_max_token_len_per_gpu
    per_device_train_batch_size ppo_micro_batch_size_per_gpu
engine.distributed_optimizer: use_distributed_optimizer zero_stage
engine.optimizer_offload_fraction: optimizer_cpu_offload optimizer_offload offload_optimizer adam_offload cpu_offload
batch.prompts: batch_size train_batch_size global_batch_size rollout_batch_size prompts_per_step
batch.group: n num_generations n_samples_per_prompt samples_per_prompt num_samples group_size rollout_n n_samples
batch.minibatches: mini_batches num_minibatches ppo_mini_batch_size num_steps_per_rollout ppo_epochs num_iterations
rollout.engines: num_engines vllm_num_engines rollout_num_engines num_workers
rollout.tp: rollout_tp vllm_tensor_parallel_size rollout_num_gpus_per_engine
rollout.max_new_tokens: max_tokens max_response_length max_completion_length generate_max_len max_response_len
    response_length
rollout.max_prompt_tokens: max_prompt_length prompt_max_len max_prompt_len rollout_max_prompt_len
rollout.temperature: sampling_temperature
rollout.max_lag: max_staleness staleness off_policy_steps
data.prompts: dataset train_data train_file train_files prompt_data data_path dataset_name
data.reward: reward_fn reward_function reward_funcs rm_type custom_reward_function reward_model
eval.prompts: val_data val_file val_files eval_data eval_prompt_data eval_dataset validation
eval.every: eval_interval eval_steps eval_freq test_freq
eval.samples: k n_samples_per_eval_prompt eval_samples
train.lr: learning_rate actor_learning_rate max_lr
train.steps: max_steps num_steps total_steps total_training_steps train_iters num_rollout epochs num_epochs
    num_train_epochs total_epochs
train.lr_warmup_iters: warmup_steps lr_warmup_steps num_warmup_steps warmup warmup_iters warmup_ratio
train.lr_decay_style: lr_scheduler lr_scheduler_type scheduler warmup_style
train.clip_grad: grad_clip max_grad_norm gradient_clipping max_norm
train.weight_decay: wd
train.adam_beta1: beta1
train.adam_beta2: beta2
train.adam_eps: adam_epsilon
critic.lr: critic_learning_rate critic_lr
critic.gae_lambda: lam lambd gae_lam
critic.value_clip: cliprange_value value_clip_range
objective.eps_low: clip_eps clip_ratio clip_ratio_low cliprange epsilon eps_clip
objective.eps_high: clip_ratio_high epsilon_high eps_clip_high
objective.kl_coef: kl_beta beta kl_loss_coef init_kl_coef
objective.entropy_coef: entropy_coeff ent_coef entropy_bonus
objective: algorithm loss_type loss advantage_estimator adv_estimator policy_loss
run.dir: output_dir save_dir out_dir save work_dir default_local_dir checkpoint_dir
run.seed: random_seed
run.save_every: save_interval save_steps save_freq
run.keep: save_total_limit max_actor_ckpt_to_keep keep_last
run.loggers: logger report_to use_wandb use_tensorboard wandb
launch.trainers: num_gpus n_gpus n_gpus_per_node world_size nproc_per_node num_processes actor_num_gpus_per_node
launch.store: master_addr master_port rendezvous rdzv_endpoint
sft.data: demonstrations sft_data
"""
MEANT = {name: key for key, names in re.findall(r"^(\S+):([^:]*)$", NAMES, re.M) for name in names.split()}


def meant(key: str, inside: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    """What to say of the unknown `key`, "section.name" or a name at the top: "did you mean 'train.lr'?" or where to
    look.

    inside: the names that a user gave below `key`, where it holds some. sections: the names that each section has.
    """
    section, _, name = key.rpartition(".")
    if hint := _spelt(section, name, sections):
        return f"did you mean {hint!r}?"
    for word in [name, *inside] if not section else [name]:
        plain = word.lower().replace("-", "_")
        if plain in MEANT:
            return f"did you mean {MEANT[plain]!r}?"
        if elsewhere := [f"{other}.{plain}" for other, names in sections.items() if plain in names]:
            return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    if section in sections:
        return f"section {section!r} has {', '.join(sections[section])}"
    return "docs/config.md lists the keys"


def _spelt(section: str, name: str, sections: Mapping[str, Sequence[str]]) -> str | None:
    """The key of the same section, or the section, that is spelt nearly so."""
    near = difflib.get_close_matches(name, sections.get(section, list(sections)), n=1, cutoff=0.7)
    return f"{section}.{near[0]}" if near and section else near[0] if near else None

"""Optimizer and learning-rate schedule: Megatron's own, under Megatron's names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config import Config, decay_iters
from megarl.engine import hybrid_adam
from megarl.engine.adam_state import parts_of
from megarl.engine.model import Model


def build_optimizer(config: Config, model: Model, optimizer_steps: int) -> tuple[Any, OptimizerParamScheduler]:
    """Adam with float32 master weights, and the schedule over `optimizer_steps`."""
    train, offload = config.train, config.engine.optimizer_offload_fraction
    bf16 = model.config.bf16
    settings = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.engine.distributed_optimizer,
    )
    if offload:
        _put_in_host_memory(settings, offload)
    optimizer = get_megatron_optimizer(settings, model.chunks, use_gloo_process_groups=False)
    if config.engine.distributed_optimizer:
        _gather_once(optimizer)
    if model.parallel.device.device.type == "cuda" and model.profile.adam == "torch":
        _fuse_adam(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    decay = decay_iters(train.lr_decay_iters, optimizer_steps, train.lr_warmup_iters)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr if train.lr_decay_style != "constant" else 0.0,
        lr_warmup_steps=train.lr_warmup_iters,
        lr_decay_steps=decay,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _put_in_host_memory(settings: OptimizerConfig, fraction: float) -> None:
    """A master weight lies where its moments do and not on the device too: so it is under
    use_precision_aware_optimizer, which is set afterwards since megatron-core asks Transformer Engine for its version
    without asking whether it is there.
    """
    hybrid_adam.install()
    settings.optimizer_cpu_offload, settings.optimizer_offload_fraction = True, fraction
    settings.overlap_cpu_optimizer_d2h_h2d = True
    settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    settings.store_param_remainders = False


def _gather_once(optimizer: Any) -> None:
    """megarl's answer to DistributedOptimizer.step_with_ready_grads of megatron-core 0.16: each optimizer of a chain
    gathers the parameters of all of them, the dense and the expert ones. Here the last one does.
    """
    for part in getattr(optimizer, "chained_optimizers", [])[:-1]:
        part.ddp_config = replace(part.ddp_config, overlap_param_gather=True)  # which means: not here


def _fuse_adam(optimizer: Any) -> None:
    """torch's one-kernel Adam: its default on a GPU (foreach) copies
    all parameters. Before the first step.
    """
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            group.update(fused=True, foreach=False)


def current_lr(optimizer: Any) -> float:
    return next(group["lr"] for group in optimizer.param_groups)

"""The whole configuration: its sections in order, and what follows from several of them together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megarl.config.data import DataConfig, EvalConfig
from megarl.config.sections import (
    CANARY_TOKENS,
    BatchConfig,
    CriticConfig,
    EngineConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    ScoreConfig,
    Section,
    SftConfig,
    SyncConfig,
    TrainConfig,
)
from megarl.objective.presets import ObjectiveConfig, resolve_objective


class Config(Section):
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    objective: ObjectiveConfig = Field(
        default_factory=lambda: resolve_objective("minirl"),
        description=(
            "A preset's name, or {preset: name, key: value, ...} with the keys of "
            "megarl.objective.presets.ObjectiveConfig."
        ),
    )
    batch: BatchConfig = Field(default_factory=BatchConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    sync: SyncConfig = Field(default_factory=SyncConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)

    def changed(self, **sections: dict[str, Any]) -> Config:
        """A new configuration with other values for some keys of some sections; this one stays as it is."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        )

    @property
    def replay_mode(self) -> Literal["none", "R2", "R3"]:
        """replay.mode, or its default for the degree of off-policiness N (docs/objective.md, "Mini-batches")."""
        if self.replay.mode is not None:
            return self.replay.mode
        return {1: "none", 2: "R2"}.get(self.batch.minibatches, "R3")  # type: ignore[return-value]

    def rollout_dtype(self, *, on_gpu: bool) -> Literal["float32", "bfloat16"]:
        """In which rollout servers hold the weights, and are sent them: what rollout.dtype auto stands for."""
        for dtype in (self.rollout.dtype, self.engine.dtype):
            if dtype != "auto":
                return dtype
        return "bfloat16" if on_gpu else "float32"

    @property
    def server_context(self) -> int:
        """Tokens that a rollout server must hold for one request: the longest prompt and response, or the canary of a
        weight sync and one more.
        """
        return max(self.rollout.max_prompt_tokens + self.rollout.max_new_tokens, CANARY_TOKENS + 1)

    @property
    def wants_routes(self) -> bool:
        """Whether the rollout engine captures routes at all."""
        return self.replay_mode == "R3" or self.replay.metrics

    @property
    def optimizer_steps(self) -> int:
        """Of a whole run, where no mini-batch is skipped."""
        return self.train.steps * self.batch.minibatches


def walk() -> Iterator[tuple[str, Any, Any]]:
    """Every key as (dotted name, its pydantic field, the section's class), in the order of the file."""
    for name, field in Config.model_fields.items():
        section = field.annotation
        if name == "objective" or not (isinstance(section, type) and issubclass(section, Section)):
            yield name, field, Config
            continue
        for key, inner in section.model_fields.items():
            yield f"{name}.{key}", inner, section

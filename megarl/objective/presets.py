"""The objectives as one table: a preset is a set of choices, and every choice is a key of `ObjectiveConfig`.

Every objective here has a gradient of the form  sum_t  sg[w_t M_t c_t] A_t grad log pi_theta(y_t) / denominator:
`weight` names w, `clip` M, `correction` c, `advantage` A (docs/objective.md). The functions behind the names, with
their sources, are listed in megarl/objective/choices.py.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from megarl.errors import UserError, shown
from megarl.objective.choices import CHOICES


class ObjectiveConfig(BaseModel):
    """One objective. Presets fill in the fields; `{preset: minirl, is_cap: 10.0}` overrides some of them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, validate_default=True, allow_inf_nan=False
    )

    preset: str = Field("minirl", description="Name of the preset the other keys start from.")
    advantage: str = Field(
        "mean",
        description=(
            "Reward itself, minus the group's mean, that over the group's standard deviation, minus the mean of the "
            "others (RLOO), minus the group's mean over the batch's standard deviation (REINFORCE++ baseline), or GAE "
            "from a critic."
        ),
    )
    weight: str = Field(
        "is",
        description=(
            "Weight of a token's gradient: 1, min(pi_theta/mu, is_cap), r = pi_theta/pi_old, clip(r), the sequence "
            "ratio (GSPO), the soft gate (SAPO)."
        ),
    )
    clip: str = Field(
        "ratio",
        description=(
            "Which tokens are dropped: none, by r and the sign of A, by the sequence ratio, or by |pi_theta - mu| > "
            "tv_delta."
        ),
    )
    denominator: Literal["responses", "response_tokens", "max_length", "tokens", "group_tokens"] = Field(
        "responses",
        description=(
            "Responses; responses with 1/|y| inside; responses x max_length; tokens of the mini-batch; groups, "
            "1/tokens inside."
        ),
    )
    eps_low: float = Field(0.2, ge=0, description="Lower clip: r < 1 - eps_low.")
    eps_high: float = Field(0.27, ge=0, description="Upper clip: r > 1 + eps_high.")
    is_cap: float = Field(
        5.0, gt=0, description="Truncation of the importance weight pi_theta/mu, and of the mismatch metrics."
    )
    max_length: int = Field(256, ge=1, description="Constant length of denominator max_length, in tokens.")
    tv_delta: float = Field(0.2, gt=0, description="Largest |pi_theta - mu| of clip tv, in probability.")
    tau_pos: float = Field(1.0, gt=0, description="Temperature of the soft gate where A > 0.")
    tau_neg: float = Field(1.05, gt=0, description="Temperature of the soft gate where A <= 0.")
    correction: str = Field("none", description="Correction of pi_old/mu, for weights that do not hold mu themselves.")
    correction_low: float = Field(0.5, ge=0, description="Lower bound of the masks and of the rejection.")
    correction_high: float = Field(
        2.0, gt=0, description="Upper bound of the masks and of the rejection; the cap of the truncations."
    )
    kl_coef: float = Field(0.0, ge=0, description="Weight of KL(pi_theta || reference), estimator k3, per token.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus, per token.")

    @field_validator(*CHOICES)
    @classmethod
    def _known_or_a_path(cls, value: str, info: ValidationInfo) -> str:
        """A path is imported later, where it is needed: a report reads a run whose modules are elsewhere."""
        choices = CHOICES[str(info.field_name)]
        if value not in choices and "." not in value:
            raise ValueError(f"unknown{_nearest(value, [*choices])}, or give a dotted path module.function")
        return value

    @model_validator(mode="after")
    def _mu_enters_once(self) -> ObjectiveConfig:
        if self.weight == "is" and self.correction != "none":
            raise ValueError(
                f"weight 'is' already divides by mu; set correction none (is {self.correction!r}) or weight ratio"
            )
        if self.correction_low > self.correction_high:
            raise ValueError(
                f"correction_low {self.correction_low} is above correction_high {self.correction_high}; swap them"
            )
        return self


_GRPO: dict[str, Any] = {
    "advantage": "mean_std",
    "weight": "ratio",
    "clip": "ratio",
    "denominator": "response_tokens",
    "eps_low": 0.2,
    "eps_high": 0.2,
}

# What differs from the fields' defaults, which are MiniRL's.
_TABLE: dict[str, dict[str, Any]] = {
    "reinforce": {"weight": "one", "clip": "none"},
    "minirl": {},
    "minirl-no-is": {"weight": "ratio"},
    "minirl-no-clip": {"clip": "none"},
    "minirl-length-norm": {"denominator": "response_tokens"},
    "grpo": _GRPO,
    "dr-grpo": {**_GRPO, "advantage": "mean", "denominator": "max_length"},
    "dapo": {**_GRPO, "eps_high": 0.28, "denominator": "tokens"},
    "cispo": {
        "advantage": "mean_std",
        "weight": "clipped_ratio",
        "clip": "none",
        "denominator": "group_tokens",
        "eps_low": 1.0,  # no lower clip: a ratio is positive
    },
    "gspo": {**_GRPO, "weight": "sequence_ratio", "clip": "sequence_ratio", "eps_low": 3e-4, "eps_high": 4e-4},
    "ppo": {**_GRPO, "advantage": "gae", "denominator": "tokens"},
    "sapo": {**_GRPO, "weight": "soft_gate", "clip": "none"},
    "dppo-tv": {"clip": "tv", "is_cap": 1e4},  # the cap of the authors' scripts, in the place of none
}

presets: dict[str, ObjectiveConfig] = {name: ObjectiveConfig(preset=name, **fields) for name, fields in _TABLE.items()}


def resolve_objective(value: str | dict[str, Any] | ObjectiveConfig) -> ObjectiveConfig:
    """A preset's name, or {preset: name, key: value, ...} (preset defaults to minirl), as a config of its own.

    Raises UserError, one line, for an unknown preset or key (with the nearest valid one) or a bad value.
    """
    if isinstance(value, ObjectiveConfig):
        return value.model_copy()
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, dict):
        raise UserError(
            f"objective {shown(value)} is a {type(value).__name__}; give a preset's name, e.g. minirl, or "
            f"{{preset: minirl, is_cap: 5.0}}"
        )
    name = value.get("preset", "minirl")
    if not isinstance(name, str) or name not in presets:
        raise UserError(f"objective.preset {name!r} is unknown{_nearest(str(name), list(presets))}")
    for key in value:
        if key not in ObjectiveConfig.model_fields:
            raise UserError(
                f"unknown config key 'objective.{key}'{_nearest(str(key), list(ObjectiveConfig.model_fields))}"
            )
    try:
        return ObjectiveConfig.model_validate({**presets[name].model_dump(), **value})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["objective", *map(str, first["loc"])])
        given = f" = {shown(first['input'])}" if first["loc"] else ""
        why = first["msg"].removeprefix("Value error, ")
        raise UserError(f"config key {key!r}{given}: {why[0].lower()}{why[1:]}") from None


def _nearest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(choices)}"

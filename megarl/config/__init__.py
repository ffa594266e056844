"""The configuration: one typed tree. `load_config("run.yaml", ["train.lr=1e-5"])` is the only way in; docs/config.md is
made from sections.py and data.py.
"""

from megarl.config.data import DataConfig
from megarl.config.load import dump_config, keep_config, load_config
from megarl.config.sections import (
    CANARY_TOKENS,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    decay_iters,
)
from megarl.config.tree import Config, walk

__all__ = [
    "CANARY_TOKENS",
    "Config",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "ParallelConfig",
    "decay_iters",
    "dump_config",
    "keep_config",
    "load_config",
    "walk",
]

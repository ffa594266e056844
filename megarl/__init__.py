"""megarl: stable reinforcement learning of large MoE language models. Importing this imports nothing heavy."""

__version__ = "0.1.0"

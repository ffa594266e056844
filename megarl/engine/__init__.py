"""The training engine: the only folder that imports megatron."""

"""One module a family: its table and how config.json decides the Megatron model."""

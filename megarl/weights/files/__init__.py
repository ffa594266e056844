"""Weights on disk: safetensors, Hugging Face folders, Megatron checkpoints (torch_dist)."""

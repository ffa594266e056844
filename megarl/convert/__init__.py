"""Offline conversion between Hugging Face folders and Megatron checkpoints, one tensor at a time."""

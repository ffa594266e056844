"""Bytes between processes: process groups, CUDA IPC, shared memory."""

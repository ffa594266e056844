"""Benchmarks on one GPU, each part a process of its own: bash
tools/bench/gpu.sh. docs/gpu.md holds predictions and outcomes.
"""

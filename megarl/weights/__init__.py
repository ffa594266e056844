"""Weights: one declarative map a family, and what follows from it. Imports torch, no engine."""

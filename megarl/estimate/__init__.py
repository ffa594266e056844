"""Estimates from config.json alone: memory of a rank, bytes and seconds of a weight sync. Runs nothing."""

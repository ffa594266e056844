"""What a run writes while it runs: metrics.jsonl and loggers, the live line, samples to read, the trace."""

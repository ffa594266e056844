"""What a run shows: metrics.jsonl and TensorBoard, the live line, samples to read, one HTML page of curves."""

"""Training: the DeepSpeed engine, the loop, what it measures and what it shows."""

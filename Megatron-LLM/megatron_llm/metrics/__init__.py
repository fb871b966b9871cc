"""The reports of a training: log lines, metrics.jsonl, TensorBoard and Weights & Biases."""

"""What a training reports: log lines, metrics.jsonl, TensorBoard, Weights & Biases."""

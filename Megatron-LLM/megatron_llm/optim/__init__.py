"""The optimizer: AdamW, loss scaling for fp16, and the guards of an update."""

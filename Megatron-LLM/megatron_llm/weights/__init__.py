"""Layouts of weights: Hugging Face, Megatron, Meta."""

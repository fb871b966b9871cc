"""The layouts of weights: Hugging Face, Megatron and Meta; and the model card."""

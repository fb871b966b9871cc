"""The flags of finetune.py: what they are, what the original's were, and what is checked of them."""

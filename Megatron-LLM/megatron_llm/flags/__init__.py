"""The flags of finetune.py: their definitions, the flags of the original, and their checks."""

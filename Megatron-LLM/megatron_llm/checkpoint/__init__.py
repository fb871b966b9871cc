"""Checkpoints of training: their folder, the saver beside training, and which are kept."""

"""Checkpoints of training: their folder, the saver that writes them beside training, and which of them are kept."""

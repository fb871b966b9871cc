"""SnakModel Toolkit: raw text and a base model to a continually pre-trained model, on any Slurm cluster."""

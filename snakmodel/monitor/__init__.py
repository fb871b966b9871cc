"""What a user sees of a run: its state, why, and what to do next."""

"""What a user sees of a run: the state of each stage, the reasons for it, and what to do next."""

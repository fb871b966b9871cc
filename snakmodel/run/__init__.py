"""A run's folder: paths, task lists, done markers, attempts, events and the lock."""

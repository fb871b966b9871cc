"""This process: signals, heartbeat, memory, errors."""

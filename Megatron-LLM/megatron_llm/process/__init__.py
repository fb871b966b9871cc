"""The process of a rank: its signals, heartbeat, memory and errors."""

"""Memory, step time and checkpoint sizes of layouts, before GPUs are asked for."""

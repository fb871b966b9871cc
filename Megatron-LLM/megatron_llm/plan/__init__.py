"""The forecast of memory, step time and checkpoint sizes for each layout, before GPUs are requested."""

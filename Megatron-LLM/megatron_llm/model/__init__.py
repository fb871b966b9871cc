"""The model: its geometry and layers, and how its matrices are cut over tensor-parallel ranks."""

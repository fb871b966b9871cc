"""The model: its geometry, layers, and parts over tensor-parallel ranks."""

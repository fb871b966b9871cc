"""The files that users write: cluster.yaml and recipes, checked key by key."""

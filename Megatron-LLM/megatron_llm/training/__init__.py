"""One run on this rank: assembled, resumed, and its loop."""

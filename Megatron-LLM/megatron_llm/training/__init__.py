"""One training run on this rank: how it is assembled, resumed and looped."""

"""The gate after a change of weights, which compares logits before and after it."""

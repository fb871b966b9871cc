"""The gate behind a weight change: logits before and after are compared."""

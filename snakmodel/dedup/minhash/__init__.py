"""MinHash signatures that equal text-dedup's, computed by compiled code."""

"""MinHash signatures: text-dedup's, compiled."""

"""Frozen text models behind small protocols: language models, encoders, and a sentence cache that keeps randomness."""

"""The MovieLens benchmark: real titles, a frozen language model, and a simulator fitted to real ratings."""

"""What reproduces the published results, measures speed, and shows the whole idea once."""

"""What reproduces the published results, compares learners and estimators, measures speed, and shows the whole idea."""

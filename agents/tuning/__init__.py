"""Tuning from the log alone: which estimator, which settings of a learner, which policy, which kernel bandwidth.

Each is a function that gives a :class:`agents.Tuning`: all candidates with what was found of each, and the one chosen.
"""

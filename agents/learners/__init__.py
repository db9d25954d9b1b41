"""Learners: one frozen configuration each; ``fit(log, ...)`` gives a policy, ``fit_many`` one for each of many logs.

A new method is one pure surrogate in :mod:`agents.gradients` and one frozen configuration with an ``_objective``.
"""

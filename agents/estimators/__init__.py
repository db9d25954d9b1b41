"""Off-policy estimates of a policy's value ``V(π) = E[r]`` from a log alone.

Each is a frozen configuration; ``estimate(policy, log, ...)`` gives an :class:`offprompts_env.types.Estimate` whose
terms, one a round, average to the value, with what a reader must know before trusting it.
"""

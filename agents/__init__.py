"""Everything that learns from a log: policies, reward models, learners and estimators, built on PyTorch.

    learner = agents.DSO(tau=1.0)
    policy = learner.fit(log, generator=simulator.outputs, seed=0)
    policy.save("policy"); agents.load_policy("policy", prompts=log.prompts)
"""

from agents.kernels import (
    GaussianKernel,
    Kernel,
    KnownDensity,
    LoggingDensity,
    MonteCarloDensity,
    NetworkDensity,
    UniformKernel,
)
from agents.learners import (
    DSO,
    BehaviorCloning,
    Callback,
    ImportanceSamplingPG,
    Learner,
    OnlinePG,
    RegressionPG,
    logging_policies,
    logging_policy,
    record_rounds,
)
from agents.policies import (
    ConstantPolicy,
    EpsilonGreedyPolicy,
    NeuralPolicy,
    OraclePolicy,
    SoftmaxPolicy,
    UniformPolicy,
    load_policy,
    save_policy,
)
from agents.rewards import (
    FittedRewards,
    PromptRewardRegression,
    PromptRewards,
    SentenceRewardRegression,
    SentenceRewards,
)
from agents.training import TrainingWarning

__all__ = [
    "DSO",
    "BehaviorCloning",
    "Callback",
    "ConstantPolicy",
    "EpsilonGreedyPolicy",
    "FittedRewards",
    "GaussianKernel",
    "ImportanceSamplingPG",
    "Kernel",
    "KnownDensity",
    "Learner",
    "LoggingDensity",
    "MonteCarloDensity",
    "NetworkDensity",
    "NeuralPolicy",
    "OnlinePG",
    "OraclePolicy",
    "PromptRewardRegression",
    "PromptRewards",
    "RegressionPG",
    "SentenceRewardRegression",
    "SentenceRewards",
    "SoftmaxPolicy",
    "TrainingWarning",
    "UniformKernel",
    "UniformPolicy",
    "load_policy",
    "logging_policies",
    "logging_policy",
    "record_rounds",
    "save_policy",
]

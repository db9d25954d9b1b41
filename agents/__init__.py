"""Everything that learns from a log: policies, reward models, learners and estimators, built on PyTorch.

A learner is a frozen configuration: ``agents.DSO(tau=1.0).fit(log, generator=simulator.outputs)`` gives a policy, which
``save(path)`` writes and ``agents.load_policy(path)`` reads. ``fit_many`` learns from many logs as one batched problem.
"""

from agents.clustering import EmbeddingClusters, KnownClusters, OutputClusters, PromptClustering, PromptClusters
from agents.distillation import TwoStepRegression
from agents.estimators.base import Estimator
from agents.estimators.direct import DM
from agents.estimators.kernel import KernelIS
from agents.estimators.weighting import IS
from agents.kernels import (
    GaussianKernel,
    Kernel,
    KnownDensity,
    LoggingDensity,
    MonteCarloDensity,
    NetworkDensity,
    UniformKernel,
)
from agents.learners.base import Callback, Learner, Objective, OfflineLearner, OfflinePolicyGradient
from agents.learners.cloning import BehaviorCloning, OnlineCloning
from agents.learners.convolution import (
    BallNeighbours,
    KernelNeighbours,
    NearestNeighbours,
    Neighbourhood,
    PolicyConvolutionPG,
    TreeNeighbours,
)
from agents.learners.counterfactual import (
    CRM,
    BanditNet,
    BetaIPSPG,
    ExponentialSmoothingPG,
    LogarithmicSmoothingPG,
    WeightedLogLikelihood,
)
from agents.learners.dso import DSO
from agents.learners.online import OnlinePG
from agents.learners.potec import POTEC
from agents.learners.prompt import DoublyRobustPG, ImportanceSamplingPG, RegressionPG
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
from agents.recipes import logging_policies, logging_policy
from agents.rewards import (
    FittedRewards,
    FittedSentenceRewards,
    PromptRewardRegression,
    PromptRewards,
    SentenceRewardRegression,
    SentenceRewards,
    load_rewards,
)
from agents.training import AssumptionWarning, TrainingWarning
from agents.tuning.crossvalidation import cross_validate, cross_validate_estimators
from agents.tuning.record import Tuning
from agents.tuning.selection import select_policy
from agents.tuning.slope import slope
from agents.two_stage import SecondStage, TwoStagePolicy

__all__ = [
    "CRM",
    "DM",
    "DSO",
    "IS",
    "POTEC",
    "AssumptionWarning",
    "BallNeighbours",
    "BanditNet",
    "BehaviorCloning",
    "BetaIPSPG",
    "Callback",
    "ConstantPolicy",
    "DoublyRobustPG",
    "EmbeddingClusters",
    "EpsilonGreedyPolicy",
    "Estimator",
    "ExponentialSmoothingPG",
    "FittedRewards",
    "FittedSentenceRewards",
    "GaussianKernel",
    "ImportanceSamplingPG",
    "Kernel",
    "KernelIS",
    "KernelNeighbours",
    "KnownClusters",
    "KnownDensity",
    "Learner",
    "LogarithmicSmoothingPG",
    "LoggingDensity",
    "MonteCarloDensity",
    "NearestNeighbours",
    "Neighbourhood",
    "NetworkDensity",
    "NeuralPolicy",
    "Objective",
    "OfflineLearner",
    "OfflinePolicyGradient",
    "OnlineCloning",
    "OnlinePG",
    "OraclePolicy",
    "OutputClusters",
    "PolicyConvolutionPG",
    "PromptClustering",
    "PromptClusters",
    "PromptRewardRegression",
    "PromptRewards",
    "RegressionPG",
    "SecondStage",
    "SentenceRewardRegression",
    "SentenceRewards",
    "SoftmaxPolicy",
    "TrainingWarning",
    "TreeNeighbours",
    "Tuning",
    "TwoStagePolicy",
    "TwoStepRegression",
    "UniformKernel",
    "UniformPolicy",
    "WeightedLogLikelihood",
    "cross_validate",
    "cross_validate_estimators",
    "load_policy",
    "load_rewards",
    "logging_policies",
    "logging_policy",
    "save_policy",
    "select_policy",
    "slope",
]

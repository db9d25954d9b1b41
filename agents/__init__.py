"""Everything that learns from a log: policies, reward models, learners and estimators, built on PyTorch.

A learner is a frozen configuration: ``agents.DSO(tau=1.0).fit(log, generator=simulator.outputs)`` gives a policy, which
``save(path)`` writes and ``agents.load_policy(path)`` reads. ``fit_many`` learns from many logs as one batched problem.
"""

from agents.clustering import EmbeddingClusters, KnownClusters, OutputClusters, PromptClustering, PromptClusters
from agents.distillation import TwoStepRegression
from agents.estimators.base import Estimator
from agents.estimators.clustered import MIPS, OffCEM
from agents.estimators.direct import DM
from agents.estimators.doubly_robust import DR, SNDR, DRos, SubGaussianDR, SwitchDR
from agents.estimators.kernel import KernelDR, KernelIS
from agents.estimators.loggers import BalancedIS, NaiveIS, WeightedIS
from agents.estimators.online import Online
from agents.estimators.sentence import SentenceDM
from agents.estimators.streaming import estimate_stream
from agents.estimators.weighting import (
    IS,
    SNIPS,
    BetaIPS,
    ExponentialSmoothing,
    LogarithmicSmoothing,
    SubGaussianIS,
)
from agents.hierarchical import HierarchicalPolicy, TreeSoftmax
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
from agents.learners.exact import ExactDSO, SentencePG
from agents.learners.online import OnlinePG
from agents.learners.potec import POTEC
from agents.learners.prompt import DoublyRobustPG, ImportanceSamplingPG, RegressionPG
from agents.learners.sentence import SentenceGreedy, SentenceModels
from agents.learners.sentence_dr import SentenceDR
from agents.policies import (
    ConstantPolicy,
    EpsilonGreedyPolicy,
    NeuralPolicy,
    OraclePolicy,
    SoftmaxPolicy,
    TiltedPolicy,
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
from agents.sentence_rewards import NetworkEnsemble, PolynomialRidge, SentenceRewardSearch
from agents.sentences import SentenceRegression, SentenceScores
from agents.training import AssumptionWarning, TrainingWarning
from agents.tuning.bandwidth import TunedDSO, choose_tau
from agents.tuning.crossvalidation import cross_validate, cross_validate_estimators
from agents.tuning.record import Tuning
from agents.tuning.selection import select_policy
from agents.tuning.slope import slope
from agents.two_stage import SecondStage, TwoStagePolicy

__all__ = [
    "CRM",
    "DM",
    "DR",
    "DSO",
    "IS",
    "MIPS",
    "POTEC",
    "SNDR",
    "SNIPS",
    "AssumptionWarning",
    "BalancedIS",
    "BallNeighbours",
    "BanditNet",
    "BehaviorCloning",
    "BetaIPS",
    "BetaIPSPG",
    "Callback",
    "ConstantPolicy",
    "DRos",
    "DoublyRobustPG",
    "EmbeddingClusters",
    "EpsilonGreedyPolicy",
    "Estimator",
    "ExactDSO",
    "ExponentialSmoothing",
    "ExponentialSmoothingPG",
    "FittedRewards",
    "FittedSentenceRewards",
    "GaussianKernel",
    "HierarchicalPolicy",
    "ImportanceSamplingPG",
    "Kernel",
    "KernelDR",
    "KernelIS",
    "KernelNeighbours",
    "KnownClusters",
    "KnownDensity",
    "Learner",
    "LogarithmicSmoothing",
    "LogarithmicSmoothingPG",
    "LoggingDensity",
    "MonteCarloDensity",
    "NaiveIS",
    "NearestNeighbours",
    "Neighbourhood",
    "NetworkDensity",
    "NetworkEnsemble",
    "NeuralPolicy",
    "Objective",
    "OffCEM",
    "OfflineLearner",
    "OfflinePolicyGradient",
    "Online",
    "OnlineCloning",
    "OnlinePG",
    "OraclePolicy",
    "OutputClusters",
    "PolicyConvolutionPG",
    "PolynomialRidge",
    "PromptClustering",
    "PromptClusters",
    "PromptRewardRegression",
    "PromptRewards",
    "RegressionPG",
    "SecondStage",
    "SentenceDM",
    "SentenceDR",
    "SentenceGreedy",
    "SentenceModels",
    "SentencePG",
    "SentenceRegression",
    "SentenceRewardRegression",
    "SentenceRewardSearch",
    "SentenceRewards",
    "SentenceScores",
    "SoftmaxPolicy",
    "SubGaussianDR",
    "SubGaussianIS",
    "SwitchDR",
    "TiltedPolicy",
    "TrainingWarning",
    "TreeNeighbours",
    "TreeSoftmax",
    "TunedDSO",
    "Tuning",
    "TwoStagePolicy",
    "TwoStepRegression",
    "UniformKernel",
    "UniformPolicy",
    "WeightedIS",
    "WeightedLogLikelihood",
    "choose_tau",
    "cross_validate",
    "cross_validate_estimators",
    "estimate_stream",
    "load_policy",
    "load_rewards",
    "logging_policies",
    "logging_policy",
    "save_policy",
    "select_policy",
    "slope",
]

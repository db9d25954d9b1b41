"""Everything that learns from a log: policies, reward models, learners and estimators, built on PyTorch.

A learner is a frozen configuration: ``agents.DSO(tau=1.0).fit(log, generator=simulator.outputs)`` gives a policy, which
``save(path)`` writes and ``agents.load_policy(path)`` reads. ``fit_many`` learns from many logs as one batched problem.

What a name stands for is imported when it is first asked for, so that a command line or a report of a log need not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.adapters.predictor import Predictor as Predictor
    from agents.clustering import (
        EmbeddingClusters as EmbeddingClusters,
        KnownClusters as KnownClusters,
        OutputClusters as OutputClusters,
        PromptClustering as PromptClustering,
        PromptClusters as PromptClusters,
    )
    from agents.distillation import TwoStepRegression as TwoStepRegression
    from agents.embeddings import (
        EmbeddedOutputs as EmbeddedOutputs,
        LearnedEmbedding as LearnedEmbedding,
        RewardEmbedding as RewardEmbedding,
        load_embedding as load_embedding,
    )
    from agents.estimators.base import Estimator as Estimator
    from agents.estimators.clustered import MIPS as MIPS, OffCEM as OffCEM
    from agents.estimators.direct import DM as DM
    from agents.estimators.doubly_robust import (
        DR as DR,
        SNDR as SNDR,
        DRos as DRos,
        SubGaussianDR as SubGaussianDR,
        SwitchDR as SwitchDR,
    )
    from agents.estimators.kernel import KernelDR as KernelDR, KernelIS as KernelIS
    from agents.estimators.loggers import BalancedIS as BalancedIS, NaiveIS as NaiveIS, WeightedIS as WeightedIS
    from agents.estimators.online import Online as Online
    from agents.estimators.sentence import SentenceDM as SentenceDM
    from agents.estimators.streaming import estimate_stream as estimate_stream
    from agents.estimators.weighting import (
        IS as IS,
        SNIPS as SNIPS,
        BetaIPS as BetaIPS,
        ExponentialSmoothing as ExponentialSmoothing,
        LogarithmicSmoothing as LogarithmicSmoothing,
        SubGaussianIS as SubGaussianIS,
    )
    from agents.export import describe_export as describe_export, export_policy as export_policy
    from agents.hierarchical import HierarchicalPolicy as HierarchicalPolicy, TreeSoftmax as TreeSoftmax
    from agents.inspection import LogReport as LogReport, inspect_log as inspect_log
    from agents.kernels import (
        GaussianKernel as GaussianKernel,
        Kernel as Kernel,
        KnownDensity as KnownDensity,
        LoggingDensity as LoggingDensity,
        MonteCarloDensity as MonteCarloDensity,
        NetworkDensity as NetworkDensity,
        UniformKernel as UniformKernel,
    )
    from agents.learners.base import (
        Callback as Callback,
        Learner as Learner,
        Objective as Objective,
        OfflineLearner as OfflineLearner,
        OfflinePolicyGradient as OfflinePolicyGradient,
    )
    from agents.learners.cloning import BehaviorCloning as BehaviorCloning, OnlineCloning as OnlineCloning
    from agents.learners.convolution import (
        BallNeighbours as BallNeighbours,
        KernelNeighbours as KernelNeighbours,
        NearestNeighbours as NearestNeighbours,
        Neighbourhood as Neighbourhood,
        PolicyConvolutionPG as PolicyConvolutionPG,
        TreeNeighbours as TreeNeighbours,
    )
    from agents.learners.counterfactual import (
        CRM as CRM,
        BanditNet as BanditNet,
        BetaIPSPG as BetaIPSPG,
        ExponentialSmoothingPG as ExponentialSmoothingPG,
        LogarithmicSmoothingPG as LogarithmicSmoothingPG,
        WeightedLogLikelihood as WeightedLogLikelihood,
    )
    from agents.learners.dso import DSO as DSO
    from agents.learners.embedded import Embedded as Embedded
    from agents.learners.exact import ExactDSO as ExactDSO, SentencePG as SentencePG
    from agents.learners.online import OnlinePG as OnlinePG
    from agents.learners.potec import POTEC as POTEC
    from agents.learners.prompt import (
        DoublyRobustPG as DoublyRobustPG,
        ImportanceSamplingPG as ImportanceSamplingPG,
        RegressionPG as RegressionPG,
    )
    from agents.learners.sentence import SentenceGreedy as SentenceGreedy, SentenceModels as SentenceModels
    from agents.learners.sentence_dr import SentenceDR as SentenceDR
    from agents.policies import (
        ConstantPolicy as ConstantPolicy,
        EpsilonGreedyPolicy as EpsilonGreedyPolicy,
        NeuralPolicy as NeuralPolicy,
        OraclePolicy as OraclePolicy,
        SoftmaxPolicy as SoftmaxPolicy,
        TiltedPolicy as TiltedPolicy,
        UniformPolicy as UniformPolicy,
        load_policy as load_policy,
        save_policy as save_policy,
    )
    from agents.recipes import (
        logging_policies as logging_policies,
        logging_policy as logging_policy,
        online_logging_policies as online_logging_policies,
        online_logging_policy as online_logging_policy,
    )
    from agents.rewards import (
        FittedRewards as FittedRewards,
        FittedSentenceRewards as FittedSentenceRewards,
        PromptRewardRegression as PromptRewardRegression,
        PromptRewards as PromptRewards,
        SentenceRewardRegression as SentenceRewardRegression,
        SentenceRewards as SentenceRewards,
        load_rewards as load_rewards,
    )
    from agents.sentence_rewards import (
        NetworkEnsemble as NetworkEnsemble,
        PolynomialRidge as PolynomialRidge,
        SentenceRewardSearch as SentenceRewardSearch,
    )
    from agents.sentences import SentenceRegression as SentenceRegression, SentenceScores as SentenceScores
    from agents.training import AssumptionWarning as AssumptionWarning, TrainingWarning as TrainingWarning
    from agents.tuning.bandwidth import TunedDSO as TunedDSO, choose_tau as choose_tau
    from agents.tuning.crossvalidation import (
        cross_validate as cross_validate,
        cross_validate_estimators as cross_validate_estimators,
    )
    from agents.tuning.record import Tuning as Tuning
    from agents.tuning.selection import select_policy as select_policy
    from agents.tuning.slope import slope as slope
    from agents.two_stage import SecondStage as SecondStage, TwoStagePolicy as TwoStagePolicy

_NAMES = {
    "agents.clustering": (
        "EmbeddingClusters",
        "KnownClusters",
        "OutputClusters",
        "PromptClustering",
        "PromptClusters",
    ),
    "agents.distillation": ("TwoStepRegression",),
    "agents.estimators.base": ("Estimator",),
    "agents.estimators.clustered": (
        "MIPS",
        "OffCEM",
    ),
    "agents.estimators.direct": ("DM",),
    "agents.estimators.doubly_robust": (
        "DR",
        "SNDR",
        "DRos",
        "SubGaussianDR",
        "SwitchDR",
    ),
    "agents.estimators.kernel": (
        "KernelDR",
        "KernelIS",
    ),
    "agents.estimators.loggers": (
        "BalancedIS",
        "NaiveIS",
        "WeightedIS",
    ),
    "agents.estimators.online": ("Online",),
    "agents.estimators.sentence": ("SentenceDM",),
    "agents.estimators.streaming": ("estimate_stream",),
    "agents.estimators.weighting": (
        "IS",
        "SNIPS",
        "BetaIPS",
        "ExponentialSmoothing",
        "LogarithmicSmoothing",
        "SubGaussianIS",
    ),
    "agents.adapters.predictor": ("Predictor",),
    "agents.export": ("describe_export", "export_policy"),
    "agents.hierarchical": (
        "HierarchicalPolicy",
        "TreeSoftmax",
    ),
    "agents.inspection": (
        "LogReport",
        "inspect_log",
    ),
    "agents.kernels": (
        "GaussianKernel",
        "Kernel",
        "KnownDensity",
        "LoggingDensity",
        "MonteCarloDensity",
        "NetworkDensity",
        "UniformKernel",
    ),
    "agents.learners.base": (
        "Callback",
        "Learner",
        "Objective",
        "OfflineLearner",
        "OfflinePolicyGradient",
    ),
    "agents.learners.cloning": (
        "BehaviorCloning",
        "OnlineCloning",
    ),
    "agents.learners.convolution": (
        "BallNeighbours",
        "KernelNeighbours",
        "NearestNeighbours",
        "Neighbourhood",
        "PolicyConvolutionPG",
        "TreeNeighbours",
    ),
    "agents.learners.counterfactual": (
        "CRM",
        "BanditNet",
        "BetaIPSPG",
        "ExponentialSmoothingPG",
        "LogarithmicSmoothingPG",
        "WeightedLogLikelihood",
    ),
    "agents.embeddings": (
        "EmbeddedOutputs",
        "LearnedEmbedding",
        "RewardEmbedding",
        "load_embedding",
    ),
    "agents.learners.dso": ("DSO",),
    "agents.learners.embedded": ("Embedded",),
    "agents.learners.exact": (
        "ExactDSO",
        "SentencePG",
    ),
    "agents.learners.online": ("OnlinePG",),
    "agents.learners.potec": ("POTEC",),
    "agents.learners.prompt": (
        "DoublyRobustPG",
        "ImportanceSamplingPG",
        "RegressionPG",
    ),
    "agents.learners.sentence": (
        "SentenceGreedy",
        "SentenceModels",
    ),
    "agents.learners.sentence_dr": ("SentenceDR",),
    "agents.policies": (
        "ConstantPolicy",
        "EpsilonGreedyPolicy",
        "NeuralPolicy",
        "OraclePolicy",
        "SoftmaxPolicy",
        "TiltedPolicy",
        "UniformPolicy",
        "load_policy",
        "save_policy",
    ),
    "agents.recipes": (
        "logging_policies",
        "logging_policy",
        "online_logging_policies",
        "online_logging_policy",
    ),
    "agents.rewards": (
        "FittedRewards",
        "FittedSentenceRewards",
        "PromptRewardRegression",
        "PromptRewards",
        "SentenceRewardRegression",
        "SentenceRewards",
        "load_rewards",
    ),
    "agents.sentence_rewards": (
        "NetworkEnsemble",
        "PolynomialRidge",
        "SentenceRewardSearch",
    ),
    "agents.sentences": (
        "SentenceRegression",
        "SentenceScores",
    ),
    "agents.training": (
        "AssumptionWarning",
        "TrainingWarning",
    ),
    "agents.tuning.bandwidth": (
        "TunedDSO",
        "choose_tau",
    ),
    "agents.tuning.crossvalidation": (
        "cross_validate",
        "cross_validate_estimators",
    ),
    "agents.tuning.record": ("Tuning",),
    "agents.tuning.selection": ("select_policy",),
    "agents.tuning.slope": ("slope",),
    "agents.two_stage": (
        "SecondStage",
        "TwoStagePolicy",
    ),
}
_PLACES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

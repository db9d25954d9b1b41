"""Models of Stable-Baselines3, and ``MaskablePPO`` of its contrib package: trained, or while they train."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load as deserialise, save as serialise

from agents.adapters.base import Adapter, check_arms, check_epsilon, features, smoothed
from agents.adapters.storage import Stored, read_agent, write_agent
from agents.adapters.vec_env import check_masks
from offprompts_env.config import check_kind
from offprompts_env.errors import ConfigError, DimensionError, StorageError, foreign, missing_dependency
from offprompts_env.types import Array, Contexts, FloatArray, LoggedDataset, PromptSet

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.policies import BasePolicy

Masks = Callable[[Contexts], npt.ArrayLike]

# The policies that a file may name, and where they are.
_POLICIES = {
    "ActorCriticPolicy": "stable_baselines3.common.policies",
    "MultiInputActorCriticPolicy": "stable_baselines3.common.policies",
    "DQNPolicy": "stable_baselines3.dqn.policies",
    "MultiInputPolicy": "stable_baselines3.dqn.policies",
    "MaskableActorCriticPolicy": "sb3_contrib.common.maskable.policies",
    "MaskableMultiInputActorCriticPolicy": "sb3_contrib.common.maskable.policies",
}


class StableBaselines3(Adapter):
    """A model of Stable-Baselines3 over prompts, as it is now.

    An actor–critic model (PPO, A2C, MaskablePPO, ...) draws from its own distribution. One that maximises Q (DQN, ...)
    plays ``(1 − ε) 1{a = argmax Q} + ε / A``, where ε is by default the rate at which it explores now: 1 before
    ``learning_starts``, then ``exploration_rate``. So either is also what the model draws from while it trains, and
    may be the ``policy`` of a recorder; see :class:`~agents.adapters.vec_env.PromptVecEnv`.

    The model sees the observation that it was made for: the environments' dict with ``MultiInputPolicy``, or ``[x, q]``
    with ``MlpPolicy``. One trained under ``VecNormalize`` needs that environment, ``PPO.load(path, env=...)``, or it
    would see other numbers than in training.

    Attributes:
        model: as given.

    Args:
        model: a model, or a policy alone.
        prompts: the catalogue.
        epsilon: ε; an actor–critic model plays with probability ε any (allowed) prompt. None leaves it to the model;
            a recorder of its training needs that.
        masks: ``f(contexts) -> (n, A) bool``, which prompts MaskablePPO may play; None allows all, where the model's
            own environment does.

    Raises:
        ConfigError: not a model, a recurrent one, a space that these environments do not have, or an argument that
            does not fit it.
        DimensionError: another number of actions than prompts.
    """

    def __init__(
        self,
        model: BaseAlgorithm | BasePolicy,
        prompts: PromptSet,
        *,
        epsilon: float | None = None,
        masks: Masks | None = None,
    ) -> None:
        super().__init__(prompts)
        from stable_baselines3.common.base_class import BaseAlgorithm
        from stable_baselines3.common.policies import BasePolicy

        if not isinstance(model, BaseAlgorithm | BasePolicy):
            raise ConfigError(
                f"model: expected a model of Stable-Baselines3 or its policy, got {type(model).__name__}; pass what "
                "PPO(...) returned, or PPO.load(path)"
            )
        self.model = model
        self._epsilon = None if epsilon is None else check_epsilon(epsilon)
        self._masks = masks
        self._dimensions = _dimensions(self.policy, prompts)
        self._check_fit()

    def _check_fit(self) -> None:
        """Raise :class:`ConfigError` where model and arguments do not go together."""
        name = type(self.policy).__name__
        if hasattr(self.policy, "lstm_actor"):
            raise ConfigError(f"model: {name} is recurrent, but a round is an episode of its own; use PPO")
        drawing = getattr(self.policy, "get_distribution", None)
        if drawing is None and self._epsilon is None and not hasattr(self.model, "exploration_rate"):
            raise ConfigError(f"epsilon: {name} chooses and knows no rate of exploration; pass one, 0.05 is usual")
        self._maskable = drawing is not None and "action_masks" in inspect.signature(drawing).parameters
        if self._masks is not None and not (self._maskable and callable(self._masks)):
            raise ConfigError(
                f"masks: expected a function of contexts, for a MaskablePPO of sb3-contrib, got "
                f"{type(self._masks).__name__} for {name}"
            )

    @property
    def policy(self) -> BasePolicy:
        """The network that acts."""
        model: Any = self.model
        policy: BasePolicy = getattr(model, "policy", model)
        return policy

    @property
    def epsilon(self) -> float:
        """ε of this moment."""
        if self._epsilon is not None:
            return self._epsilon
        # As `OffPolicyAlgorithm._sample_action` and `DQN.predict` have it.
        if getattr(self.model, "learning_starts", 0) > getattr(self.model, "num_timesteps", 0):
            return 1.0
        return float(getattr(self.model, "exploration_rate", 0.0))

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf of this moment, (n, A) float64.

        Raises:
            ConfigError: the model trains under masks, and none were given.
            DimensionError: contexts of another dimension than the model was made for, or masks of another shape.
            DataError: no prompt is allowed.
            AgentError: the model raised.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        observation = self._observation(contexts)
        policy: Any = self.policy
        if not hasattr(policy, "get_distribution"):
            with self._looking(len(contexts)):
                actions, _ = policy.predict(observation, deterministic=True)
            return smoothed(actions, self.n_prompts, self.epsilon, len(contexts))
        allowed = self._allowed(contexts)
        with self._looking(len(contexts)), torch.no_grad():
            tensors, _ = policy.obs_to_tensor(observation)
            masks = {} if allowed is None else {"action_masks": allowed}
            pmf = policy.get_distribution(tensors, **masks).distribution.probs.cpu().numpy().astype(np.float64)
        if self.epsilon > 0:
            others = np.ones_like(pmf) if allowed is None else allowed
            pmf = (1 - self.epsilon) * pmf + self.epsilon * others / others.sum(axis=1, keepdims=True)
        return np.asarray(pmf)

    def _allowed(self, contexts: Contexts) -> Array | None:
        if self._masks is None:
            env = getattr(self.model, "env", None)
            if self._maskable and env is not None and env.has_attr("action_masks"):
                raise ConfigError(
                    "masks: expected a function, as the model trains under masks and draws from fewer prompts; pass "
                    'masks=lambda contexts: model.env.env_method("action_masks") to record its training, or another '
                    "function of contexts"
                )
            return None
        with foreign(f"masks raised in {len(contexts)} rounds"):
            return check_masks(self._masks(contexts), len(contexts), self.n_prompts)

    def _observation(self, contexts: Contexts) -> Any:
        """Return the contexts as the model sees them."""
        expected = self._dimensions
        if "features" in expected:
            observation: Any = features(contexts, expected["features"]).astype(np.float32)
        else:
            observation = {"context": contexts.context, "query": contexts.query}
            for name, vectors in observation.items():
                if vectors.shape[1] != expected[name]:
                    raise DimensionError(
                        f"{name}: expected {expected[name]} numbers a round, as the model was made for, got "
                        f"{vectors.shape[1]}; use it in the world that it was trained in"
                    )
        normalising = self._normalising()
        return observation if normalising is None else normalising.normalize_obs(observation)

    def _normalising(self) -> Any:
        """Return the ``VecNormalize`` that the model trains under, or None."""
        return getattr(self.model, "get_vec_normalize_env", lambda: None)()

    @contextmanager
    def _looking(self, n: int) -> Iterator[None]:
        """Evaluate the policy as it acts, without dropout and the like, and leave it in the mode it was in."""
        policy = self.policy
        training = policy.training
        policy.set_training_mode(False)
        try:
            with foreign(f"{type(policy).__name__} raised in {n} rounds"):
                yield
        finally:
            policy.set_training_mode(training)

    def learn(self, log: LoggedDataset) -> None:
        """Do nothing: these models learn in their own loop, ``model.learn(steps)``."""
        self._check_log(log)

    def save(self, path: str | Path) -> Path:
        """Write what acts: the policy's weights, and how to make it again. Its training goes on from SB3's own file.

        Raises:
            ConfigError: a policy that JSON cannot describe.
            StorageError: it cannot be written.
        """
        if self._normalising() is not None:
            raise _indescribable("observations normalised by VecNormalize")
        settings = _describe(self.policy) | {"dimensions": self._dimensions}
        # Shared tensors have to be copied: safetensors takes none twice.
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.policy.state_dict().items()}
        fresh = _build(settings, self.n_prompts).state_dict()
        if {name: t.shape for name, t in fresh.items()} != {name: t.shape for name, t in weights.items()}:
            raise _indescribable("layers of its own")
        settings |= {"epsilon": self.epsilon, "masked": self._masks is not None}
        stored = Stored(type(self).__name__, "stable-baselines3", serialise(weights), self.prompts, settings)
        return write_agent(stored, path)

    @classmethod
    def load(cls, path: str | Path, *, masks: Masks | None = None) -> StableBaselines3:
        """Read what :meth:`save` wrote; its ``model`` is the policy alone, on the CPU, with the ε of that moment.

        Args:
            path: the directory.
            masks: as for the class; functions are not saved.

        Raises:
            StorageError: not such a directory, or damaged.
            ConfigError: saved with masks, and now without.
        """
        stored = read_agent(path, cls.__name__)
        try:
            policy = _build(stored.settings, len(stored.prompts))
            policy.load_state_dict(deserialise(stored.content))
            epsilon, masked = stored.settings["epsilon"], stored.settings["masked"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            raise StorageError(
                f"agent: {path} does not describe a policy of Stable-Baselines3: {type(error).__name__}: {error}; "
                "save it again"
            ) from error
        if masked and masks is None:
            raise ConfigError("masks: the agent was saved with masks; pass the function again: load(path, masks=...)")
        return cls(policy, stored.prompts, epsilon=epsilon, masks=masks)


def _dimensions(policy: BasePolicy, prompts: PromptSet) -> dict[str, int]:
    """Return the length of each part of the observation: ``context`` and ``query``, or ``features``.

    Raises:
        ConfigError: other spaces than these environments have.
        DimensionError: another number of actions than prompts.
    """
    seen, played = policy.observation_space, policy.action_space
    if not isinstance(played, spaces.Discrete) or played.start != 0:
        raise ConfigError(f"model: expected the actions Discrete({len(prompts)}), one a prompt, got {played}")
    check_arms(int(played.n), prompts, "stable-baselines3")
    parts: Mapping[str, spaces.Space[Any]] = seen.spaces if isinstance(seen, spaces.Dict) else {"features": seen}
    vectors = {name: part.shape[0] for name, part in parts.items() if isinstance(part, spaces.Box) and part.shape}
    shapes = {name: part.shape for name, part in parts.items()}
    if vectors.keys() not in ({"context", "query"}, {"features"}) or any(len(s or ()) != 1 for s in shapes.values()):
        raise ConfigError(
            "model: expected observations with the vectors 'context' and 'query', or one vector of both, got "
            f"{seen}; make the model for an environment of this project"
        )
    return vectors


def _indescribable(what: str) -> ConfigError:
    return ConfigError(
        f"StableBaselines3.save: expected a policy that JSON can describe, got one with {what}; save it with "
        "Stable-Baselines3's own model.save(path), and wrap what load(path) of its class returns"
    )


def _describe(policy: BasePolicy) -> dict[str, Any]:
    """Return what :func:`_build` makes `policy` from, except for the dimensions."""
    from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor

    kind = type(policy)
    if _POLICIES.get(kind.__name__) != kind.__module__:
        raise _indescribable(f"the class {kind.__name__}")
    if policy.features_extractor_class not in (CombinedExtractor, FlattenExtractor):
        raise _indescribable(f"the features extractor {policy.features_extractor_class.__name__}")
    made_from = policy._get_constructor_parameters()
    activation = getattr(made_from["activation_fn"], "__name__", "a function")
    if getattr(torch.nn, activation, None) is not made_from["activation_fn"]:
        raise _indescribable(f"the activation {activation}")
    shared = getattr(policy, "share_features_extractor", None)
    sharing = {} if shared is None else {"share_features_extractor": shared}
    network = {"net_arch": made_from["net_arch"]} | sharing
    return {"policy": kind.__name__, "network": network, "activation": activation}


def _build(settings: Mapping[str, Any], n_prompts: int) -> BasePolicy:
    """Make a policy from its description; its weights are random.

    Raises:
        MissingDependencyError: a policy of sb3-contrib, which is not installed.
        KeyError: it describes no known policy.
    """
    try:
        kind = getattr(import_module(_POLICIES[settings["policy"]]), settings["policy"])
    except ImportError as error:
        if not _POLICIES[settings["policy"]].startswith("sb3_contrib"):
            raise
        raise missing_dependency("sb3-contrib", "sb3-contrib", "a policy of MaskablePPO") from error
    boxes: dict[str, spaces.Space[Any]] = {
        name: spaces.Box(-np.inf, np.inf, (size,), np.float32) for name, size in settings["dimensions"].items()
    }
    seen = boxes["features"] if "features" in boxes else spaces.Dict(boxes)
    activation = getattr(torch.nn, settings["activation"])
    with torch.random.fork_rng(devices=[]):  # to save a model must not change how it goes on
        policy: BasePolicy = kind(
            seen, spaces.Discrete(n_prompts), lambda _: 0.0, activation_fn=activation, **settings["network"]
        )
    policy.set_training_mode(False)
    return policy

"""The environments of a domain: those of MovieLens over another bundle."""

from __future__ import annotations

from offprompts_env.envs import MovieLensEnv, MovieLensVectorEnv


class DomainEnv(MovieLensEnv):
    """A frozen language model says something about an item, steered by a prompt; a simulated user reacts.

    ## Description
    A user with a taste x asks about an item of your catalogue. A policy picks a prompt; the language model writes a
    sentence; a model trained on your users' reactions says how probably this user likes what is said so.

    ## Action Space
    `Discrete(n_prompts)`: the index of a prompt.

    ## Observation Space
    `Dict(context=Box(d_x), query=Box(d_q))`, float32: the user's taste in the items' features, and the item's encoding.

    ## Rewards
    `10 · (P(like | user, sentence) − P(like | user, sentences without a prompt))` plus normal noise of standard
    deviation 0.05; or, with `reward_type="binary"`, a coin of probability `P(like | user, sentence)`. The probability
    is that of a like among the reactions that were likes or dislikes.

    ## Starting State
    A user and an item are drawn uniformly and independently.

    ## Episode End
    Every episode ends after one step with `terminated=True`.

    ## Arguments
    `bundle`, the folder, which :func:`~offprompts_env.domain.register_domain` fills in, and all other arguments of
    :class:`~offprompts_env.envs.MovieLensEnv`.

    ## Reproducibility
    The world is the bundle, whose files are checked against their checksums. The same seed gives the same rounds.

    ## Data and Licence
    Yours.

    ## Citation
    Kiyohara, Cao, Saito, Joachims: An Off-Policy Learning Approach for Steering Sentence Generation towards
    Personalization. RecSys 2025. arXiv 2504.02646.

    ## Version History
    - as registered.
    """


class DomainVectorEnv(MovieLensVectorEnv):
    """Native vector form of :class:`DomainEnv`, with the same arguments and `num_envs`."""

"""Kernel weights without sampling: expectations over the generator's noise, and over all prompts.

With a Gaussian kernel of bandwidth τ, ``h = τ d_o``, and a sentence of prompt a that is ``Normal(m_a, diag(v))`` after
the noise added to both sentences,

    K̄(s, a) = E[K(s, s') | a] = Π_j √(h² / (h² + v_j)) · exp(−½ Σ_j (s_j − m_aj)² / (h² + v_j)) / (√(2π) τ)

and the logging marginal density is ``π₀(s | x, q) = Σ_a π₀(a | x, q) K̄(s, a)``. The published method samples both
(Kiyohara, Cao, Saito, Joachims, RecSys 2025, arXiv 2504.02646).

Symbols: ``n`` rounds, ``A`` prompts, ``d_o`` output dimension.
"""

from __future__ import annotations

import math

import numpy as np

from agents.kernels import GaussianKernel
from agents.sentences import SentenceMeans
from offprompts_env.errors import NumericalError
from offprompts_env.sampling import check_probabilities
from offprompts_env.types import Contexts, FloatArray, Policy


def expected_similarity(
    kernel: GaussianKernel, logged: FloatArray, means: FloatArray, noise_std: FloatArray
) -> FloatArray:
    """Return ``K̄(s, a)`` of `logged` sentences (n, d_o) and prompts with `means` (n, A, d_o), (n, A) float32.

    Args:
        kernel: its `output_noise` blurs both sentences.
        logged: s.
        means: m.
        noise_std: of the generator, (d_o,).
    """
    dim = logged.shape[1]
    width = (kernel.tau * dim) ** 2
    variance = width + np.square(noise_std, dtype=np.float64) + 2 * kernel.output_noise**2
    factor = float(np.exp(0.5 * np.sum(np.log(width / variance)))) / (math.sqrt(2 * math.pi) * kernel.tau)
    scale = np.sqrt(0.5 / variance).astype(np.float32)
    # Differences first: ‖u‖² − 2 u·m + ‖m‖² would lose the digits of sentences that are far from zero.
    apart = means - logged[:, None]
    apart *= scale
    squared = np.einsum("nad,nad->na", apart, apart)
    np.exp(-squared, out=squared)
    squared *= np.float32(factor)
    return np.asarray(squared)


def kernel_weights(
    kernel: GaussianKernel, logged: FloatArray, contexts: Contexts, sentences: SentenceMeans, logging_policy: Policy
) -> FloatArray:
    """Return ``K̄(s_i, a) / π₀(s_i | x_i, q_i)`` of all prompts, (n, A) float32: their mean over π₀ is one in every row.

    Raises:
        NumericalError: the means are not finite, or no prompt of the logging policy says anything like a logged
            sentence, to the last digit.
    """
    means = sentences.means(contexts)
    similarity = expected_similarity(kernel, logged, means, sentences.noise_std)
    pmf = check_probabilities(logging_policy.probabilities(contexts), len(contexts), sentences.n_prompts)
    density = np.einsum("na,na->n", pmf, similarity, dtype=np.float64)
    if not np.isfinite(density).all():
        raise NumericalError("sentences: expected finite means of all prompts, got NaN; check the generator")
    if not (density > 0).all():
        row = int(np.argmin(density > 0))
        raise NumericalError(
            f"kernel: the sentence of row {row} is so far from those of all prompts that its density is zero; choose a "
            f"wider kernel than tau={kernel.tau:g}"
        )
    similarity /= density[:, None].astype(np.float32)
    return similarity

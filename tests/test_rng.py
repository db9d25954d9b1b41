import numpy as np

from offprompts_env.rng import integer_seed, stream


def test_same_name_same_stream_other_name_other_stream() -> None:
    first = stream(7, "world", "prompts").random(4)
    assert (first == stream(7, "world", "prompts").random(4)).all()
    for other in (
        stream(7, "world", "outputs"),
        stream(8, "world", "prompts"),
        stream(7, "world"),
        stream(7, "world", 0),
    ):
        assert (first != other.random(4)).all()


def test_streams_are_uncorrelated() -> None:
    rows = np.stack([stream(0, "s", i).standard_normal(20_000) for i in range(4)])
    off_diagonal = np.corrcoef(rows)[np.triu_indices(4, 1)]
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(20_000)


def test_integer_seed_fits_torch() -> None:
    seeds = {integer_seed(0, "torch", i) for i in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)

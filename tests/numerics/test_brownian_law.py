"""The law of what the paths draw: distributions, moments, independence. Each has a control that fails.

Small versions with fixed keys by default; the full sizes, with fresh keys, carry the marker `slow`.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from nde.solvers.brownian import BrownianGrid, BrownianInterval

SIZES = [
    (20_000, 0),
    *(pytest.param(131_072, seed, marks=pytest.mark.slow) for seed in range(1, 9)),
]
# Ends that are nodes, ends inside leaves, and queries that are less and more than a tenth.
TIMES = [0.0, 0.0371, 0.125, 0.3, 0.3177, 0.5, 0.71, 1.0]


def interval(key):
    return BrownianInterval(0.0, 1.0, (), key, levy_area=diffrax.SpaceTimeLevyArea, tol=2.0**-8)


def grid(key):
    return BrownianGrid(0.0, 1.0, 0.125, (), key, levy_area=diffrax.SpaceTimeLevyArea)


def sequential(key):
    """Increments between neighbors in `TIMES`, each in units of its own law: rows W and H."""
    path = interval(key)
    state, rows = path.init(), []
    for s, t in zip(TIMES[:-1], TIMES[1:], strict=True):
        x, state = path.draw(s, t, state, use_levy=True)
        rows.append(jnp.stack([x.W, x.H * np.sqrt(12.0)]) / np.sqrt(t - s))
    return jnp.concatenate(rows)


def cells(key):
    path = grid(key)
    draws = jax.vmap(lambda n: path.cell(n, use_levy=True))(jnp.arange(8))
    return jnp.stack([draws.W, draws.H * np.sqrt(12.0)]).ravel() / np.sqrt(0.125)


def joined(key):
    """Overlapping queries over several cells: not independent of one another."""
    path = grid(key)
    rows = []
    for s, t in [(0.0, 1.0), (0.25, 0.5), (0.125, 0.875)]:
        x = path.evaluate(s, t, use_levy=True)
        rows.append(jnp.stack([x.W, x.H * np.sqrt(12.0)]) / np.sqrt(t - s))
    return jnp.concatenate(rows)


SAMPLERS = {"interval": sequential, "grid": cells, "grid, joined": joined}


def sample(sampler, n, seed):
    keys = jax.random.split(jax.random.key(1000 + seed), n)
    return np.asarray(jax.jit(jax.vmap(sampler))(keys))


def looks_standard(x):
    """Each column N(0, 1): Kolmogorov-Smirnov, and the first four moments within 4.5 standard errors."""
    n = len(x)
    ks = min(scipy.stats.kstest(column, "norm").pvalue for column in x.T) > 1e-5
    mean = np.abs(x.mean(axis=0)).max() < 4.5 / np.sqrt(n)
    variance = np.abs((x**2).mean(axis=0) - 1).max() < 4.5 * np.sqrt(2 / n)
    fourth = np.abs((x**4).mean(axis=0) - 3).max() < 4.5 * np.sqrt(96 / n)
    return bool(ks and mean and variance and fourth)


def looks_independent(x):
    """Largest correlation of two columns, and of their squares, below 4.5 standard errors."""
    off = ~np.eye(x.shape[1], dtype=bool)
    limit = 4.5 / np.sqrt(len(x))
    return all(np.abs(np.corrcoef(y.T)[off]).max() < limit for y in (x, x**2))


@pytest.mark.parametrize("n, seed", SIZES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_increments_and_areas_are_normal(name, n, seed):
    x = sample(SAMPLERS[name], n, seed)
    assert looks_standard(x)
    if name != "grid, joined":
        assert looks_independent(x)


@pytest.mark.parametrize(
    "mistake", ["variance 6% off", "mean", "heavy tails", "reused key", "uniform"]
)
def test_a_wrong_law_is_noticed(mistake):
    x = sample(cells, 20_000, 0).copy()
    if mistake == "variance 6% off":
        x[:, 3] *= 1.03
    elif mistake == "mean":
        x[:, 3] += 0.05
    elif mistake == "heavy tails":
        x[:, 3] = np.sign(x[:, 3]) * np.abs(x[:, 3]) ** 1.2
        x[:, 3] /= x[:, 3].std()
    elif mistake == "reused key":
        x[:, 3] = x[:, 8]
    elif mistake == "uniform":
        x[:, 3] = np.random.default_rng(0).uniform(-np.sqrt(3), np.sqrt(3), len(x))
    assert not (looks_standard(x) and looks_independent(x))


def bridges(key, cut=0.3):
    """W and H of the left part, then of the whole."""
    path = interval(key)
    whole = path.evaluate(0.0, 1.0, use_levy=True)
    left = path.evaluate(0.0, cut, use_levy=True)
    return jnp.stack([left.W, left.H, whole.W, whole.H])


def conditional_residuals(x, cut=0.3):
    """X1 and X2 solved from the textbook bridge: independent N(0, 1) if the bridge is right."""
    w_left, h_left, w, h = x.T
    p, q = cut, 1 - cut
    v = np.sqrt(p * q / (p**3 + q**3)) / 2
    a, b, c = v * p**2, v * q**2, v / np.sqrt(3)
    x1 = (w_left - p * w - 6 * p * q * h) / (2 * (a * p + b * q))
    x2 = (h_left - p**2 * h + a * x1) / (c * q)
    return np.stack([x1, x2, w, h * np.sqrt(12)], axis=1)


@pytest.mark.parametrize("n, seed", SIZES)
def test_conditional_bridges_have_the_textbook_law(n, seed):
    residuals = conditional_residuals(sample(bridges, n, seed))
    assert looks_standard(residuals) and looks_independent(residuals)


def test_a_bridge_at_another_cut_is_noticed():
    residuals = conditional_residuals(sample(bridges, 20_000, 0), cut=0.32)
    assert not (looks_standard(residuals) and looks_independent(residuals))


def test_two_queries_inside_one_leaf_would_be_wrong():
    """Why they are an error: a tree that answers them gives dependent increments."""

    def inside(key):
        path = BrownianInterval(0.0, 1.0, (), key, tol=1.0)  # one leaf
        first, second = path.evaluate(0.0, 0.3), path.evaluate(0.6, 1.0)
        return jnp.stack([first / np.sqrt(0.3), second / np.sqrt(0.4)])

    x = sample(inside, 20_000, 0)
    assert looks_standard(x) and not looks_independent(x)


def test_lanes_and_channels_are_independent():
    path = BrownianInterval(0.0, 1.0, (4,), jax.random.key(3), tol=2.0**-12)
    ends = jnp.linspace(0.0, 1.0, 4097)
    one = jax.jit(jax.vmap(path.evaluate))(ends[:-1], ends[1:]) * 64
    assert looks_standard(np.asarray(one)) and looks_independent(np.asarray(one))
    steps = np.asarray(one)
    lagged = np.stack([steps[:-1, 0], steps[1:, 0], steps[:-1, 1], steps[1:, 2]], axis=1)
    assert looks_independent(lagged)

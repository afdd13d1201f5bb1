"""Losses on laws of paths: the true law is the least, and each sees what it says it sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laws import TIMES, ornstein_uhlenbeck, white_noise

import nde
from nde.losses import (
    RBF,
    Energy,
    finite_dimensional_score,
    moments,
    path_score,
    signature_score,
)
from nde.train import Batch

KEY = jax.random.key(0)
SCORES = [finite_dimensional_score, signature_score, moments]


def test_pairs_see_the_dependence_that_marginals_do_not():
    """The discrepancy of pairs, in closed form: det(I + 2 C) over the differences of Gaussian pairs."""
    C = 0.5 * np.array([[1.0, np.exp(-0.5)], [np.exp(-0.5), 1.0]])
    D, I = 0.5 * np.eye(2), np.eye(2)
    roots = [np.linalg.det(I + S) ** -0.5 for S in (2 * C, 2 * D, C + D)]
    expected = roots[0] + roots[1] - 2 * roots[2]
    assert expected == pytest.approx(0.01301, abs=1e-5)

    ts = jnp.asarray([0.0, 0.5])
    real, same = (ornstein_uhlenbeck(2048, seed=s, ts=ts) for s in (0, 1))
    noise = white_noise(2048, ts=ts)
    single, pair = (
        functools.partial(finite_dimensional_score, size=size, kernel=RBF(1.0)) for size in (1, 2)
    )
    assert abs(single(ts, noise, real) - single(ts, same, real)) < 2e-3
    # E k(Y, Y') of the data is missing in both scores, and cancels
    assert pair(ts, noise, real) - pair(ts, same, real) == pytest.approx(expected, abs=4e-3)


def test_signature_score_is_least_at_the_true_law():
    score = jax.jit(functools.partial(signature_score, static_kernel=RBF(1.0)))
    real = ornstein_uhlenbeck(128, seed=0)
    true = score(TIMES, ornstein_uhlenbeck(128, seed=1), real)
    assert true + 0.01 < score(TIMES, white_noise(128), real)
    assert true + 0.01 < score(TIMES, ornstein_uhlenbeck(128, seed=2, sigma=1.6), real)


def test_signature_score_prepares_its_paths():
    real = ornstein_uhlenbeck(4, seed=0)
    shifted = functools.partial(signature_score, TIMES, real + 1.0, real + 1.0)
    plain = functools.partial(signature_score, TIMES, real, real)
    np.testing.assert_allclose(shifted(start=False), plain(start=False), rtol=1e-12)
    assert abs(shifted() - plain()) > 0.1
    both = [plain(scalings=(s,)) for s in (0.5, 1.0)]
    np.testing.assert_allclose(plain(scalings=(0.5, 1.0)), np.mean(both), rtol=1e-12)
    # a lead-lag path leaves the square of its increments as the area between its two channels
    assert jnp.isfinite(plain(lead_lag=True, start=False, scalings=(0.3,)))


def naive_score(fake, real, kernel):
    n = len(fake)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = np.mean([kernel(fake[i], fake[j]) for i, j in pairs])
    return within - 2 * np.mean([kernel(fake[i], real[j]) for i, j in pairs])


def test_what_a_mask_leaves_out_counts_in_no_score():
    rng = np.random.default_rng(0)
    fake, real = ornstein_uhlenbeck(6, seed=0), ornstein_uhlenbeck(6, seed=1)
    ts = jnp.tile(jnp.asarray(TIMES), (6, 1))
    mask = jnp.asarray(rng.uniform(size=ts.shape) > 0.3).at[2].set(False)
    mask = mask.at[:, 4].set(False)
    holes = jnp.where(mask[..., None], real, jnp.nan)
    for score in SCORES:
        loss = lambda x, mask, score=score: score(ts, x, holes, mask=mask, key=KEY)
        both = jax.jit(jax.value_and_grad(loss))
        value, gradient = both(fake, mask)
        assert jnp.isfinite(value) and jnp.all(gradient[~mask] == 0), score
        changed = jnp.where(mask[..., None], fake, 7.0)
        np.testing.assert_allclose(both(changed, mask)[0], value, rtol=1e-12)
        assert jnp.isnan(both(fake, jnp.zeros_like(mask))[0]), score


def test_energy_score_of_paths_with_their_own_times_is_the_naive_sum():
    fake, real = ornstein_uhlenbeck(5, seed=0)[:, :2], ornstein_uhlenbeck(5, seed=1)[:, :2]
    ts = jnp.sort(jax.random.uniform(KEY, (5, 2)), axis=1)
    vectors = [np.concatenate([x[..., 0], ts], axis=1) for x in (fake, real)]
    expected = naive_score(*vectors, lambda a, b: -np.linalg.norm(a - b))
    value, gradient = jax.value_and_grad(lambda x: finite_dimensional_score(ts, x, real))(fake)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert jnp.all(jnp.isfinite(gradient))


def test_moments_are_those_of_numpy():
    fake, real = (np.asarray(ornstein_uhlenbeck(50, seed=s, sigma=1.0 + s)) for s in (0, 1))

    def statistics(x):
        y = x - x.mean(axis=0)
        return x.mean(axis=0), (y**2).mean(axis=0), (y[:, 2:] * y[:, :-2]).mean(axis=0)

    pairs = zip(statistics(fake), statistics(real), strict=True)
    expected = sum(np.mean((a - b) ** 2) for a, b in pairs)
    value = moments(TIMES, jnp.asarray(fake), jnp.asarray(real), lags=[2])
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def generator(spread, ts, *, key):
    """White noise of a spread that is to be learned."""
    return spread * jax.random.normal(key, (ts.size, 1), ts.dtype)


@pytest.mark.parametrize("score", SCORES)
def test_fit_finds_the_spread_and_not_the_mean(score):
    data = jnp.tile(jnp.asarray(TIMES[:4]), (128, 1)), white_noise(128, ts=TIMES[:4])
    model = jax.tree_util.Partial(generator, jnp.asarray(0.3))
    model, history = nde.fit(
        model,
        functools.partial(path_score, score=score),
        data,
        optim=optax.adam(0.03),
        steps=60,
        progress=False,
        key=KEY,
    )
    assert float(model.args[0]) == pytest.approx(np.sqrt(0.5), abs=0.12)


def test_path_score_leaves_out_copies_padding_and_nan():
    ts = jnp.tile(jnp.asarray(TIMES), (4, 1)).at[1, 6:].set(TIMES[5])
    ys = ornstein_uhlenbeck(4, seed=0).at[0, 2].set(jnp.nan)
    batch = Batch((ts, ys), jnp.array([True, True, True, False]), jnp.asarray(0))
    seen = []

    def score(ts, fake, real, *, mask, key):
        seen.append(mask)
        return jnp.zeros(())

    model = jax.tree_util.Partial(generator, jnp.asarray(0.3))
    path_score(model, batch, KEY, score=score)
    expected = np.ones((4, 9), bool)
    expected[0, 2], expected[3], expected[1, 6:] = False, False, False
    np.testing.assert_array_equal(seen[0], expected)
    flat = Batch((ts, ys[..., 0]), batch.mask, batch.step)
    with pytest.raises(ValueError, match=r"`path_score` takes \(ts, ys\) .* ys\[..., None\]"):
        path_score(model, flat, KEY)


@pytest.mark.parametrize("score", SCORES)
def test_samples_that_cannot_be_compared(score):
    x, ts = ornstein_uhlenbeck(4, seed=0), jnp.asarray(TIMES)
    for call, message in (
        (lambda: score(ts, x[:, 1:], x), "`fake` has shape .* as many times"),
        (lambda: score(ts, x, jnp.concatenate([x, x], axis=2)), "in as many channels"),
        (lambda: score(ts[::-1], x, x), "`ts` is not in order"),
        (lambda: score(ts[1:], x, x), r"`ts` has shape \(8,\) but"),
        (lambda: score(ts, x[:1], x), "`fake` has 1 path; a law is judged by two"),
        (lambda: score(ts, x[0], x), "`fake` has shape .* a sample of paths is"),
        (lambda: score(ts, x, x, mask=x[..., 0] > 0), "`mask` was given, but `ts` has one grid"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_options_that_no_score_has():
    x = ornstein_uhlenbeck(4, seed=0)
    with pytest.raises(ValueError, match="`size` is 10 but the paths have 9 times"):
        finite_dimensional_score(TIMES, x, x, size=10, key=KEY)
    with pytest.raises(ValueError, match="`key` is None"):
        finite_dimensional_score(TIMES, x, x)
    with pytest.raises(ValueError, match="`lags` has 9"):
        moments(TIMES, x, x, lags=[9])
    with pytest.raises(ValueError, match="`power` is 2"):
        Energy(2)
    with pytest.raises(ValueError, match="`scale` is 0"):
        RBF(0)

"""Tests of laws: against SciPy, at equality, and on samples that differ in one thing only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from laws import TIMES, ornstein_uhlenbeck, white_noise

from nde import evaluate
from nde.losses import Energy

KEY = jax.random.key(0)


def cdf(x):
    return scipy.stats.norm.cdf(x, scale=np.sqrt(0.5))


def test_ks_is_that_of_scipy():
    x, y = ornstein_uhlenbeck(200, seed=0), ornstein_uhlenbeck(150, seed=1)
    two, one = evaluate.ks(x, y), evaluate.ks(x, cdf)
    assert two.statistic.shape == one.p_value.shape == x.shape[1:]
    for i in range(TIMES.size):
        sample = np.asarray(x[:, i, 0])
        exact = scipy.stats.ks_2samp(sample, np.asarray(y[:, i, 0]), method="exact")
        assert two.statistic[i, 0] == pytest.approx(exact.statistic, abs=1e-12)
        assert two.p_value[i, 0] == pytest.approx(exact.pvalue, abs=0.02)
        exact = scipy.stats.ks_1samp(sample, cdf, method="exact")
        assert one.statistic[i, 0] == pytest.approx(exact.statistic, abs=1e-12)
        assert one.p_value[i, 0] == pytest.approx(exact.pvalue, abs=0.02)


def test_ks_rejects_as_often_as_its_level_says_and_a_wrong_law_always():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 512, 1000))
    test = evaluate.ks(x, y)
    assert 0.035 < np.mean(test.p_value < 0.05) < 0.065
    quantile = evaluate.ks_quantile(0.95, 512, 512)
    np.testing.assert_array_equal(test.statistic > quantile, test.p_value < 0.05)
    assert np.all(evaluate.ks(x, 2.0 * y).p_value < 0.05)
    exact = scipy.stats.kstwo.ppf(0.95, 512)
    assert evaluate.ks_quantile(0.95, 512) == pytest.approx(exact, rel=1e-3)


def test_classifier_at_equality_and_on_another_dependence():
    tests = [
        evaluate.classifier(
            ornstein_uhlenbeck(256, seed=2 * s), ornstein_uhlenbeck(256, seed=2 * s + 1), key=KEY
        )
        for s in range(12)
    ]
    accuracies = np.array([test.statistic for test in tests])
    error = tests[0].standard_error
    assert error == pytest.approx(0.5 / 16)
    assert abs(accuracies.mean() - 0.5) < 3 * error / np.sqrt(12)
    assert 0.5 < accuracies.std() / error < 1.7
    test = evaluate.classifier(white_noise(256), ornstein_uhlenbeck(256, seed=0), key=KEY)
    assert test.statistic > 0.7 and test.p_value < 1e-6


def test_mmd_is_the_naive_sum_and_its_null_comes_from_permutations():
    x, y = ornstein_uhlenbeck(70, seed=0), ornstein_uhlenbeck(80, seed=1)
    test = evaluate.mmd(x, y, kernel=Energy(), permutations=200, key=KEY)
    a, b = (np.asarray(z).reshape(len(z), -1) for z in (x, y))

    def distances(p, q):
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))

    naive = 2 * distances(a, b).mean() - sum(
        distances(z, z).sum() / (len(z) * (len(z) - 1)) for z in (a, b)
    )
    np.testing.assert_allclose(test.statistic, naive, rtol=1e-10)
    assert test.p_value > 0.05
    other = evaluate.mmd(2.0 * x, y, permutations=200, key=KEY)
    assert other.p_value < 0.01


def test_autocorrelation_and_coverage_of_a_known_process():
    paths = ornstein_uhlenbeck(4000, seed=3)
    correlation = evaluate.autocorrelation(paths, [0, 1, 4])[:, 0]
    np.testing.assert_allclose(correlation, np.exp(-np.array([0, 1, 4]) * 0.25), atol=0.03)
    data = np.asarray(ornstein_uhlenbeck(1000, seed=4)).copy()
    data[:500, 0] = np.nan
    shares = evaluate.coverage(paths, data)
    assert shares.shape == (2, TIMES.size, 1)
    np.testing.assert_allclose(shares.mean(axis=(1, 2)), [0.5, 0.9], atol=0.02)
    np.testing.assert_allclose(shares[:, 0, 0], [0.5, 0.9], atol=0.08)
    narrow = evaluate.coverage(0.5 * paths, data).mean(axis=(1, 2))
    assert np.all(narrow < [0.3, 0.65])
    forecasts = evaluate.coverage(paths[:, None], data[:1])
    assert forecasts.shape == (2, 1, TIMES.size, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: evaluate.ks(x, x[:, 1:]), "`fake` has shape .* samples agree in all axes"),
        (lambda x: evaluate.ks(x[:1], x), r"`fake` has shape \(1, 9, 1\); a sample has two"),
        (lambda x: evaluate.ks(x.at[1, 2].set(jnp.nan), x), r"`fake` is nan at index \(1, 2, 0\)"),
        (lambda x: evaluate.ks(x, lambda v: 0.5), r"`real` returned shape \(\)"),
        (lambda x: evaluate.ks_quantile(95, 10), "`probability` is 95"),
        (lambda x: evaluate.classifier(x[:3], x, key=KEY), "fewer than 4 paths"),
        (lambda x: evaluate.classifier(x, x, key=0), "`key` is 0"),
        (lambda x: evaluate.autocorrelation(x, [9]), "`lags` has 9, but the paths have 9 times"),
        (lambda x: evaluate.coverage(x, x[:, 1:]), "data end in the axes of a draw"),
        (lambda x: evaluate.coverage(x, x, levels=[90]), "`levels` is .* such as 0.9"),
    ],
)
def test_what_cannot_be_judged(call, message):
    with pytest.raises(ValueError, match=message):
        call(ornstein_uhlenbeck(8, seed=0))

"""Least squares against closed forms, and errors that mean what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde.hybrid import Frozen, Positive
from nde.inference import profile

TS = np.linspace(0.0, 4.0, 25)
TRUE = {"rate": 0.7, "level": 2.0}
SIGMA = 0.05


def relaxation(t, y, p):
    return p["rate"] * (p["level"] - y)


def model(rate=0.4, level=1.0, cls=Positive):
    return nde.HybridODE(relaxation, None, {"rate": cls(rate), "level": level})


def exact(rate, level, ts=TS):
    return level + (0.5 - level) * np.exp(-rate * ts)


def measured(seed):
    noise = SIGMA * np.random.default_rng(seed).normal(size=TS.size)
    ys = exact(**TRUE) + np.where(TS > 0, noise, 0.0)  # the start is known
    return jnp.asarray(TS)[None], jnp.asarray(ys)[None, :, None]


def gauss_newton(ys, start=(0.7, 2.0)):
    """The estimate and its standard errors from the closed form, in physical units."""
    theta = np.array(start)
    for _ in range(20):
        rate, level = theta
        decay = np.exp(-rate * TS)
        J = np.stack([-TS * (0.5 - level) * decay, 1 - decay], axis=1)[1:]
        r = (exact(rate, level) - ys)[1:]
        theta = theta - np.linalg.solve(J.T @ J, J.T @ r)
    variance = r @ r / (len(r) - 2)
    return theta, np.sqrt(np.diagonal(variance * np.linalg.inv(J.T @ J))), J


TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def fitted(seed, **options):
    import diffrax

    tight = model()
    controller = diffrax.PIDController(**TIGHT)
    tight = nde.HybridODE(tight.known, None, tight.parameters, stepsize_controller=controller)
    return nde.least_squares(tight, measured(seed), **options)


def test_the_estimate_and_its_errors_are_those_of_the_closed_form():
    found = fitted(0)
    assert found.values == 24 and found.steps < 20
    (_, ys), names = measured(0), ("rate", "level")
    theta, errors, J = gauss_newton(np.asarray(ys[0, :, 0]))
    value, error = found.of(lambda m: m.physical_parameters())
    np.testing.assert_allclose([value[n] for n in names], theta, rtol=1e-6)
    np.testing.assert_allclose([error[n] for n in names], errors, rtol=1e-5)
    end, band = found.of(lambda m: m(jnp.asarray(TS), ys[0, 0])[-1, 0])
    variance = np.sum((exact(*theta) - ys[0, :, 0]) ** 2) / 22
    gradient = J[-1]
    expected = np.sqrt(variance * gradient @ np.linalg.inv(J.T @ J) @ gradient)
    assert abs(end - exact(*theta)[-1]) < 1e-6
    np.testing.assert_allclose(band, expected, rtol=1e-4)
    cosine = J[:, 0] @ J[:, 1] / np.linalg.norm(J[:, 0]) / np.linalg.norm(J[:, 1])
    np.testing.assert_allclose(found.inflation, 1 / (1 - cosine**2), rtol=1e-4)


def test_errors_cover_at_their_rate():
    """90 % intervals of 100 data sets: 90 +- 3 of them hold the truth, within three deviations."""
    inside = 0
    for seed in range(100):
        value, error = fitted(seed).of(lambda m: m.physical_parameters())
        inside += bool(abs(value["rate"] - TRUE["rate"]) < 1.717 * error["rate"])  # t, 22 degrees
    assert 81 <= inside <= 99


def test_samples_have_the_covariance():
    found = fitted(1)
    draws = found.samples(4000, key=jax.random.key(0))
    np.testing.assert_allclose(np.cov(draws.T), found.covariance, rtol=0.1)
    assert found.at(found.theta).parameters["rate"].value == pytest.approx(
        float(found.model.parameters["rate"].value)
    )


def test_the_profile_is_a_parabola_of_the_standard_error():
    found = fitted(0)
    value, error = found.of(lambda m: m.physical_parameters()["rate"])
    make = lambda rate: model(float(rate), cls=Frozen)
    costs = profile(make, measured(0), [value - error, value, value + error])
    variance = found.cost / (found.values - 2)
    np.testing.assert_allclose((costs - costs[1]) / variance, [1.0, 0.0, 1.0], atol=0.1)


def test_parameters_that_explain_the_same_are_named():
    twice = lambda t, y, p: p["a"] * p["b"] * (2.0 - y)
    both = nde.HybridODE(twice, None, {"a": 0.5, "b": 1.0})
    with pytest.warns(UserWarning, match=mentions(["not tell", "['a']", "['b']"])):
        nde.least_squares(both, measured(0))


@pytest.mark.slow
def test_missing_values_are_left_out():
    ts, ys = measured(0)
    holes = ys.at[0, 5].set(jnp.nan)
    found = nde.least_squares(model(), (ts, holes))
    assert found.values == 23
    kept = (jnp.delete(ts, 5, axis=1), jnp.delete(ys, 5, axis=1))
    np.testing.assert_allclose(found.theta, nde.least_squares(model(), kept).theta, rtol=1e-3)


BAD = [
    (lambda: nde.least_squares(model(), measured(0), lambda m: 0.0), ["`residuals` has signature"]),
    (
        lambda: nde.least_squares(model(), measured(0), lambda m, data: jnp.log(-data[1])),
        ["`residuals`", "not finite"],
    ),
    (
        lambda: nde.least_squares(
            model(), measured(0), lambda m, data: m(*data[0], data[1][0, 0])[:1]
        ),
        ["1 values for 2 parameters"],
    ),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=mentions(words)):
        call()

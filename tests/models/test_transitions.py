"""Likelihoods of transitions against closed forms: Ornstein-Uhlenbeck, and geometric Brownian motion."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from laws import TIMES, ornstein_uhlenbeck

from nde.losses import bridge_density, euler_density, likelihood
from nde.train import Batch

KEY = jax.random.key(0)
MU, SIGMA = 0.1, 0.5
NUMBER = jnp.asarray


class Equation(NamedTuple):
    """An SDE as two functions."""

    drift: object
    diffusion: object


OU = Equation(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y))
GBM = Equation(lambda t, y, args: MU * y, lambda t, y, args: SIGMA * y)


def ou_density(h, y0, y1):
    spread = np.sqrt((1 - np.exp(-2 * h)) / 2)
    return scipy.stats.norm.logpdf(y1, np.exp(-h) * y0, spread)


def test_one_step_tends_to_the_exact_transition():
    errors = []
    for h in (0.1, 0.05, 0.025):
        y1 = 1.0 - h + 2 * np.sqrt(h)
        value = euler_density(*OU, NUMBER(0.0), jnp.ones(1), NUMBER(h), jnp.asarray([y1]))
        errors.append(abs(value - ou_density(h, 1.0, y1)))
    assert errors[2] < 0.04 and errors[0] / errors[2] == pytest.approx(4, abs=0.5)


def test_one_step_is_exact_for_the_logarithm_of_geometric_brownian_motion():
    drift = lambda t, y, args: jnp.full_like(y, MU - SIGMA**2 / 2)
    for diffusion in (lambda t, y, args: SIGMA, lambda t, y, args: SIGMA * jnp.eye(1)):
        value = euler_density(
            drift, diffusion, NUMBER(0.0), jnp.zeros(1), NUMBER(2.0), jnp.asarray([0.7])
        )
        exact = scipy.stats.norm.logpdf(0.7, 2 * (MU - SIGMA**2 / 2), SIGMA * np.sqrt(2))
        np.testing.assert_allclose(value, exact, rtol=1e-12)


def test_general_noise_is_a_multivariate_normal():
    g = np.array([[1.0, 0.2, 0.0], [0.3, 0.5, 0.4]])
    y1, h = np.array([0.3, -0.2]), 0.5
    drift = lambda t, y, args: args * y
    value = euler_density(
        drift,
        lambda t, y, args: jnp.asarray(g),
        NUMBER(0.0),
        jnp.ones(2),
        NUMBER(h),
        jnp.asarray(y1),
        NUMBER(-0.5),
    )
    exact = scipy.stats.multivariate_normal.logpdf(y1, 0.75 * np.ones(2), h * g @ g.T)
    np.testing.assert_allclose(value, exact, rtol=1e-12)


def test_bridges_converge_to_the_exact_transition():
    y0, y1 = 1.0, 1.4
    exact = scipy.stats.lognorm.logpdf(y1, SIGMA, scale=y0 * np.exp(MU - SIGMA**2 / 2))
    matrix = lambda t, y, args: SIGMA * y[:, None]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def density(diffusion, steps):
        points = NUMBER(0.0), NUMBER([y0]), NUMBER(1.0), NUMBER([y1])
        return bridge_density(GBM.drift, diffusion, *points, steps=steps, draws=4000, key=KEY)

    errors = [float(density(GBM.diffusion, steps)) - exact for steps in (1, 4, 16)]
    assert errors[0] > 0.4 and errors[1] < 0.12 and abs(errors[2]) < 0.03
    assert density(matrix, 4) == pytest.approx(errors[1] + exact, rel=1e-12)
    one_step = euler_density(*GBM, NUMBER(0.0), NUMBER([y0]), NUMBER(1.0), NUMBER([y1]))
    assert one_step == pytest.approx(errors[0] + exact, rel=1e-12)


def test_likelihood_is_the_mean_over_the_transitions_that_are_observed():
    ts, ys = np.tile(TIMES, (3, 1)), np.asarray(ornstein_uhlenbeck(3, seed=0)).copy()
    ys[0, [0, 3]], ts[1, 7:] = np.nan, ts[1, 6]
    batch = Batch(
        (jnp.asarray(ts), jnp.asarray(ys)), jnp.array([True, True, False]), jnp.asarray(0)
    )
    logs = []
    for keep in ((0, [1, 2, 4, 5, 6, 7, 8]), (1, range(7))):
        t, y = ts[keep[0], list(keep[1])], ys[keep[0], list(keep[1]), 0]
        h = np.diff(t)
        logs.append(scipy.stats.norm.logpdf(y[1:], y[:-1] * (1 - h), np.sqrt(h)))
    value = likelihood(OU, batch, KEY)
    np.testing.assert_allclose(value, -np.mean(np.concatenate(logs)), rtol=1e-12)
    refined = functools.partial(bridge_density, steps=4, draws=64)
    rate = lambda a: Equation(lambda t, y, args: -a * y, OU.diffusion)
    loss = lambda a: likelihood(rate(a), batch, KEY, density=refined)
    assert jnp.isfinite(jax.grad(loss)(1.0))


@pytest.mark.parametrize(
    "equation, message",
    [
        (Equation(OU.drift, lambda t, y, args: jnp.ones(3)), r"`diffusion` returned shape \(3,\)"),
        (Equation(OU.drift, lambda t, y, args: jnp.ones((2, 1))), "fewer noises than channels"),
        (Equation(lambda t, y, args: y[0], OU.diffusion), r"`drift` returned shape \(\)"),
        (Equation(None, OU.diffusion), r"`model.drift` is None; it must be a function"),
    ],
)
def test_equations_without_a_density(equation, message):
    data = jnp.tile(jnp.asarray(TIMES), (2, 1)), jnp.ones((2, 9, 2))
    with pytest.raises(ValueError, match=message):
        likelihood(equation, Batch(data, jnp.ones(2, bool), jnp.asarray(0)), KEY)

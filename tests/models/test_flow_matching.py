"""Flow matching between normal laws, whose least-squares fields and least losses are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions
from scipy.optimize import linear_sum_assignment

import nde
from nde.cnf import CNF, Normal
from nde.losses import (
    Entropic,
    SchroedingerBridge,
    Straight,
    VariancePreserving,
    flow_matching,
    independent,
    optimal,
)
from nde.train import Batch

KEY = jax.random.key(1)
M, S, SIGMA = 0.7, 2.0, 0.8
COUNT = 200_000
DATA = Batch(M + S * jax.random.normal(jax.random.key(2), (COUNT, 1)))


def moments(path, t):
    """Mean, variance, covariance with the velocity, and variance and mean of the velocity, at t, for
    independent pairs of N(0, 1) and N(M, S^2)."""
    if isinstance(path, VariancePreserving):
        a = np.pi / 2 * t
        cos, sin, rate = jnp.cos(a), jnp.sin(a), np.pi / 2
        return (
            sin * M, cos**2 + sin**2 * S**2, rate * cos * sin * (S**2 - 1),
            rate**2 * (cos**2 * S**2 + sin**2), rate * cos * M,
        )  # fmt: skip
    mean, variance, covariance = t * M, (1 - t) ** 2 + t**2 * S**2, t * S**2 - (1 - t)
    own = 1 + S**2
    if isinstance(path, Straight):
        return mean, variance + path.sigma**2, covariance, own, M
    w2 = t * (1 - t)
    variance, covariance = (
        variance + path.sigma**2 * w2,
        covariance + path.sigma**2 * (1 - 2 * t) / 2,
    )
    return mean, variance, covariance, own + path.sigma**2 * (1 - 2 * t) ** 2 / (4 * w2), M


def least_squares_field(path):
    def field(t, x, args):
        mean, variance, covariance, _, rate = moments(path, t)
        return rate + covariance / variance * (x - mean)

    return field


PATHS = {
    "straight": Straight(),
    "noisy": Straight(SIGMA),
    "bridge": SchroedingerBridge(SIGMA),
    "arc": VariancePreserving(),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_loss_is_least_at_the_known_field(name):
    """The field is a polynomial in t times (1, x): the loss is quadratic, one Newton step solves it."""
    path = PATHS[name]

    def loss(weights):
        powers = jnp.arange(8.0)
        field = lambda t, x, args: weights[0] @ t**powers + weights[1] @ t**powers * x
        return flow_matching(CNF(field, Normal(1)), DATA, KEY, path=path)

    zero = jnp.zeros((2, 8))
    gradient, curvature = jax.jit(jax.grad(loss))(zero), jax.jit(jax.hessian(loss))(zero)
    weights = -jnp.linalg.solve(curvature.reshape(16, 16), gradient.reshape(16)).reshape(2, 8)
    known = least_squares_field(path)
    t = np.linspace(0.02, 0.98, 33)[:, None]
    mean, variance, *_ = moments(path, t)
    x = mean + np.sqrt(variance) * np.linspace(-2, 2, 9)
    powers = t[..., None] ** np.arange(8.0)
    found = powers @ np.asarray(weights[0]) + powers @ np.asarray(weights[1]) * x
    scale = np.sqrt(np.mean(known(t, x, None) ** 2))
    assert np.sqrt(np.mean((found - known(t, x, None)) ** 2)) < 0.02 * scale

    value = flow_matching(CNF(known, Normal(1)), DATA, KEY, path=path)
    t = (np.arange(4000) + 0.5) / 4000
    _, variance, covariance, own, _ = moments(path, t)
    weight = 4 * t * (1 - t) if isinstance(path, SchroedingerBridge) else 1.0
    np.testing.assert_allclose(value, np.mean(weight * (own - covariance**2 / variance)), rtol=0.01)
    if name == "straight":
        np.testing.assert_allclose(value, np.pi * S / 2, rtol=0.01)
    if name == "arc":
        np.testing.assert_allclose(value, np.pi**2 * S / 4, rtol=0.01)


def test_optimal_pairs_are_those_of_scipy_and_straighten_the_ways():
    x0, x1 = jax.random.normal(KEY, (48, 2)), jax.random.normal(jax.random.key(9), (48, 2)) + 1
    numbers = np.asarray(jax.jit(optimal)(KEY, x0, x1, None))
    costs = np.sum((np.asarray(x0)[:, None] - np.asarray(x1)) ** 2, axis=-1)
    rows, columns = linear_sum_assignment(costs)
    np.testing.assert_array_equal(numbers[columns], rows)
    # The velocity of the straight flow, and a loss that vanishes as the batch grows.
    field = lambda t, x, args: M + (S - 1) / (1 - t + t * S) * (x - t * M)
    losses = [
        flow_matching(CNF(field, Normal(1)), Batch(DATA.data[:n]), KEY, pairs=optimal)
        for n in (32, 512)
    ]
    assert losses[1] < 0.2 * losses[0] < 0.1 * np.pi * S / 2


def test_pairs_have_one_condition():
    labels = jnp.tile(jnp.arange(3), 16)
    args = {"class": jax.nn.one_hot(labels, 3), "size": jnp.where(labels == 2, 1.0, 0.0)}
    x0 = jax.random.normal(KEY, (48, 2))
    x1 = jax.random.normal(jax.random.key(9), (48, 2)) + 5.0 * labels[:, None].astype(float)
    for pairs in (optimal, Entropic(1.0)):
        numbers = np.asarray(pairs(KEY, x0, x1, args))
        np.testing.assert_array_equal(labels[numbers], labels)
    for c in range(3):  # and are optimal within it
        of_class = np.flatnonzero(labels == c)
        costs = np.sum((np.asarray(x0)[of_class][:, None] - np.asarray(x1)[of_class]) ** 2, -1)
        rows, columns = linear_sum_assignment(costs)
        found = np.asarray(optimal(KEY, x0, x1, args))[of_class]
        np.testing.assert_array_equal(found[columns], of_class[rows])


def test_entropic_pairs_are_drawn_from_the_plan_of_sinkhorn():
    x0, x1 = jax.random.normal(KEY, (5, 2)), jax.random.normal(jax.random.key(9), (5, 2))
    kernel = np.exp(-np.sum((np.asarray(x0)[:, None] - np.asarray(x1)) ** 2, axis=-1) / 2.0)
    u = np.ones(5)
    for _ in range(2000):
        v = 1 / (kernel.T @ u)
        u = 1 / (kernel @ v)
    plan = u[:, None] * kernel * v
    draw = jax.jit(jax.vmap(lambda key: Entropic(2.0)(key, x0, x1, None)))
    numbers = np.asarray(draw(jax.random.split(KEY, 20_000)))
    shares = np.stack([np.mean(numbers == i, axis=0) for i in range(5)])
    np.testing.assert_allclose(shares, plan / plan.sum(axis=0), atol=0.02)
    nearly_optimal = Entropic(1e-3, iterations=3000)(KEY, x0, x1, None)
    np.testing.assert_array_equal(nearly_optimal, optimal(KEY, x0, x1, None))


def test_what_does_not_count_has_no_say():
    field = nde.fields.MLPField(2, 4, 1, time=True, context=1, key=KEY)
    x, args = jax.random.normal(KEY, (6, 2)), jnp.ones((6, 1))
    mask = jnp.arange(6) < 4
    loss = functools.partial(flow_matching, CNF(field, Normal(2)), key=KEY)
    plain = loss(Batch((x, args), mask))
    assert plain == loss(Batch((x.at[4:].set(jnp.nan), args), mask)) != loss(Batch((x, args)))
    # A base with parameters is drawn from, not learned: its gradient would be that of the draws.


MISTAKES = {
    "size": (
        lambda: flow_matching(CNF(lambda t, x, args: x, Normal(2)), DATA, KEY),
        ["points of shape (1,)", "samples of shape (2,)"],
    ),
    "form": (
        lambda: flow_matching(CNF(lambda t, x, args: x, Normal(2)), Batch(jnp.zeros(3)), KEY),
        ["`batch.data`", "(examples, size)"],
    ),
    "sigma": (lambda: SchroedingerBridge(0.0), ["`sigma` is 0.0", "positive"]),
    "noise": (lambda: Straight(-1.0), ["`sigma` is -1.0"]),
    "class": (
        lambda: flow_matching(CNF(lambda t, x, args: x, Normal(1)), DATA, KEY, path=Straight),
        ["`path` is the class Straight"],
    ),
    "pairs": (
        lambda: flow_matching(CNF(lambda t, x, args: x, Normal(1)), DATA, KEY, pairs="optimal"),
        ["`pairs` is 'optimal'", "function"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=mentions(words)):
        call()


def test_independent_pairs_are_as_they_come():
    np.testing.assert_array_equal(independent(KEY, jnp.zeros((3, 1)), None, None), [0, 1, 2])

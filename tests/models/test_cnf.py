"""Flows: densities in closed form, traces that agree in the mean, and what a solve leaves alone."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions
from scipy.linalg import expm
from scipy.stats import multivariate_normal

import nde
from nde import regularizers
from nde.cnf import (
    CNF,
    AbstractTrace,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    Normal,
    one_hot,
    straightness,
)
from nde.losses import flow_likelihood
from nde.solvers import Reversible, ReversibleAdjoint
from nde.train import Batch

KEY = jax.random.key(3)
TIGHT = {
    "solver": diffrax.Dopri8(),
    "stepsize_controller": diffrax.PIDController(rtol=1e-12, atol=1e-12),
}
A = jnp.array([[0.4, -0.7, 0.2], [0.9, -0.3, 0.5], [-0.1, 0.3, 0.6]])
C = jnp.array([0.5, -1.0, 0.3])
X = jnp.array([0.3, -0.8, 1.1])


def affine(t, x, args):
    return A @ x + C


def network(size=3, context=0):
    return nde.fields.MLPField(size, 8, 1, time=True, context=context, scale=2.0, key=KEY)


def test_the_density_of_an_affine_field_is_that_of_a_normal_law():
    """x(1) = e^A z + m, so x(1) ~ N(m, e^A e^A^T)."""
    growth = expm(np.asarray(A))
    mean = np.linalg.solve(A, (growth - np.eye(3)) @ C)
    law = multivariate_normal(mean, growth @ growth.T)
    model = CNF(affine, Normal(3), **TIGHT)
    np.testing.assert_allclose(model.log_prob(X), law.logpdf(X), rtol=1e-10)
    z = Normal(3).sample(KEY)
    np.testing.assert_allclose(model.sample(KEY), growth @ z + mean, rtol=1e-10)


def test_a_density_integrates_to_one():
    field = nde.fields.MLPField(2, 16, 2, time=True, scale=3.0, key=KEY)
    model = CNF(field, Normal(2), dt0=0.1, stepsize_controller=diffrax.ConstantStepSize())
    line = jnp.linspace(-8.0, 8.0, 129)
    grid = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
    density = jnp.exp(jax.jit(jax.vmap(model.log_prob))(grid))
    np.testing.assert_allclose(jnp.sum(density) * (line[1] - line[0]) ** 2, 1.0, atol=1e-3)
    base = jnp.exp(jax.vmap(Normal(2).log_prob)(grid))
    assert jnp.max(jnp.abs(density - base)) > 0.1 * jnp.max(base)  # it is another law


class Given(AbstractTrace):
    """A trace with the random vectors that it is given."""

    trace: AbstractTrace
    noise: jax.Array

    def draw(self, key, x):
        return self.noise

    def __call__(self, products, noise):
        return self.trace(products, noise)


@functools.cache
def density_by_every_sign(name):
    """Value and gradient with each vector of signs as the probe, and exactly, on the same steps."""
    signs = jnp.array(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), axis=-1).reshape(8, 1, 3))
    finder = jnp.array([[1.0, 1.0, -1.0]])
    noise = {
        "Hutchinson": signs,
        "Hutch++": jnp.concatenate([jnp.tile(finder, (8, 1, 1)), signs], 1),
    }

    @eqx.filter_value_and_grad
    def log_prob(field, trace):
        return CNF(field, Normal(3), trace=trace).log_prob(X)

    if name == "Exact":
        return log_prob(network(), Exact())
    trace = {"Hutchinson": Hutchinson(), "Hutch++": HutchPlusPlus()}[name]
    return jax.vmap(lambda e: log_prob(network(), Given(trace, e)))(noise[name])


@pytest.mark.parametrize("name", ["Hutchinson", "Hutch++"])
def test_random_traces_have_the_exact_mean_and_gradient(name):
    exact, each = density_by_every_sign("Exact"), density_by_every_sign(name)
    assert jnp.std(each[0]) > 1e-3
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), each)
    # The trace has no say in the steps: the states are the same, and the mean is exact.
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_hutchinson_varies_as_the_signs_off_the_diagonal_and_averages_over_probes():
    """Variance 2 (|S|^2 - |diag S|^2) / n of the trace of a constant J, over one unit of time."""
    symmetric = (A + A.T) / 2
    for probes in (1, 4):
        model = CNF(affine, Normal(3), trace=Hutchinson(probes), dt0=0.25)
        log_prob = functools.partial(CNF.log_prob, model, X, None)
        values = jax.jit(jax.vmap(lambda key, f=log_prob: f(key=key)))(jax.random.split(KEY, 4000))
        expected = 2 * (jnp.sum(symmetric**2) - jnp.sum(jnp.diag(symmetric) ** 2)) / probes
        np.testing.assert_allclose(jnp.var(values), expected, rtol=0.1)


def test_forwards_and_backwards_agree():
    model = CNF(network(context=2), Normal(3), **TIGHT)
    args = jnp.array([0.7, -0.4])
    x = model.sample(KEY, args)
    back = model.solve_back(x, args)
    z = Normal(3).sample(KEY)
    np.testing.assert_allclose(back.base_point, z, atol=1e-9)

    def divergence(t, x, args):
        return jnp.trace(jax.jacrev(lambda x: model.vector_field(t, x, args))(x))

    _, gained = model.solve(jnp.arange(2.0), z, args, integrand=divergence).ys
    np.testing.assert_allclose(back.value, Normal(3).log_prob(z) - gained[-1], atol=1e-9)
    assert abs(model.log_prob(x, args[::-1]) - back.value) > 1e-2  # the condition has a say


def reversible(steps, adjoint):
    return CNF(
        network(), Normal(3), trace=Hutchinson(), solver=Reversible(diffrax.Heun()), adjoint=adjoint,
        dt0=1 / steps, stepsize_controller=diffrax.ConstantStepSize(), max_steps=steps,
    )  # fmt: skip


def gradient_of(model, points):
    values = lambda m: jnp.sum(jax.vmap(lambda x: m.log_prob(x, key=KEY))(points))
    return eqx.filter_grad(values)(model)


@pytest.mark.slow
def test_a_reversible_flow_has_the_exact_gradient_in_constant_memory():
    points = X[None] + jnp.linspace(0.0, 1.0, 64)[:, None]
    got, want = (
        eqx.filter_jit(gradient_of)(reversible(8, adjoint), points)
        for adjoint in (ReversibleAdjoint(), diffrax.DirectAdjoint())
    )
    for a, b in zip(*(jax.tree.leaves(x.vector_field) for x in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)

    def temporary(steps):
        model = reversible(steps, ReversibleAdjoint())
        lowered = eqx.filter_jit(gradient_of).lower(model, points)
        return lowered.compile().compiled.memory_analysis().temp_size_in_bytes

    # Two numbers a step and trajectory, its times: the members of a state (points, integral) are 8.
    assert temporary(256) - temporary(16) <= 2 * 8 * len(points) * (256 - 16)


@pytest.mark.slow
def test_regularizers_are_those_of_the_same_solve():
    model = CNF(network(), Normal(3))
    kinetic = functools.partial(regularizers.kinetic, energy=1.0, jacobian=0.0)
    plain, back = model.solve_back(X), model.solve_back(X, key=KEY, regularizer=kinetic)
    np.testing.assert_allclose(back.value, plain.value, rtol=1e-12)
    _, penalty = kinetic(model, jnp.array([1.0, 0.0]), X, key=KEY)
    np.testing.assert_allclose(back.penalty, penalty, rtol=1e-12)
    assert back.solution.stats["nfe"] == plain.solution.stats["nfe"]
    errors = model.solve_back(X, key=KEY, regularizer=regularizers.error_estimate)
    _, penalty = regularizers.error_estimate(model, jnp.array([1.0, 0.0]), X)
    np.testing.assert_allclose(errors.penalty, penalty, rtol=1e-10)


def test_the_loss_is_the_mean_over_the_batch_that_counts():
    model = CNF(network(context=1), Normal(3))
    xs, args = X[None] * jnp.linspace(0.5, 1.5, 4)[:, None], jnp.linspace(-1.0, 1.0, 4)[:, None]
    mask = jnp.array([True, True, False, True])
    kinetic = functools.partial(regularizers.kinetic, jacobian=0.0)
    options = {"regularizer": kinetic, "coefficient": lambda step: 0.1 * step}
    xs = xs.at[2].set(jnp.nan)
    loss, metrics = flow_likelihood(model, Batch((xs, args), mask, jnp.asarray(2)), KEY, **options)
    each = [model.log_prob(xs[i], args[i]) for i in (0, 1, 3)]
    np.testing.assert_allclose(loss - 0.2 * metrics["penalty"], -np.mean(each), rtol=1e-6)
    assert metrics["failed"] == 0 and metrics["nfe"] > 0


def rotation(t, x, args):
    return args * jnp.array([-x[1], x[0]])


def transport(t, x, args):
    """The straight flow of N(0, 1) to N(m, s^2)."""
    m, s = args
    return m + (s - 1) / (1 - t + t * s) * (x - t * m)


def test_straightness_is_zero_for_straight_ways_where_one_euler_step_is_exact():
    keys, angle = jax.random.split(KEY, 16), 1.0
    model = CNF(rotation, Normal(2), **TIGHT)
    bent, energy = straightness(model, keys, jnp.asarray(angle))
    np.testing.assert_allclose(bent, angle**2 / (2 - 2 * np.cos(angle)) - 1, rtol=1e-9)
    z = jax.vmap(model.base.sample)(keys)
    np.testing.assert_allclose(energy, angle**2 * jnp.mean(jnp.sum(z**2, axis=1)), rtol=1e-9)
    args = (jnp.array(0.7), jnp.array(2.0))
    euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize()}
    model = CNF(transport, Normal(2), dt0=1.0, **euler)
    z = jax.vmap(model.base.sample)(keys)
    xs = jax.vmap(lambda key: model.sample(key, args))(keys)
    np.testing.assert_allclose(xs, 0.7 + 2.0 * z, rtol=1e-12)
    bent, _ = straightness(CNF(transport, Normal(2), **TIGHT), keys, args)
    np.testing.assert_allclose(bent, 0.0, atol=1e-9)


class Square:
    """A base of matrices."""

    def sample(self, key):
        return jnp.zeros((2, 2))

    def log_prob(self, x):
        return jnp.sum(x)


MISTAKES = {
    "size": (lambda: CNF(affine, Normal(3)).log_prob(X[:2]), ["shape (2,)", "(3,)", "jax.vmap"]),
    "batch": (lambda: CNF(affine, Normal(3)).log_prob(X[None]), ["shape (1, 3)", "jax.vmap"]),
    "mixing": (
        lambda: CNF(nde.fields.Batched(affine), Normal(3)),
        ["`vector_field` is Batched", "mixes the examples"],
    ),
    "field": (lambda: CNF(network(2), Normal(3)).log_prob(X), ["expects (2,)"]),
    "trace": (lambda: CNF(affine, Normal(3), trace="exact"), ["`trace` is 'exact'", "Exact()"]),
    "rank": (
        lambda: CNF(affine, Normal(3), trace=HutchPlusPlus(rank=3)),
        ["rank 3 in 3 dimensions", "nde.cnf.Exact()"],
    ),
    "probes": (lambda: Hutchinson(0), ["`probes` is 0"]),
    "base": (lambda: CNF(affine, 3), ["`base` is 3", "nde.cnf.Normal(size)"]),
    "matrices": (lambda: CNF(affine, Square()), ["`base` has samples of shape (2, 2)"]),
    "label": (lambda: one_hot(jnp.array([0, 3]), 3), ["out of range", "3 classes", "0 to 3"]),
    "labels": (lambda: one_hot(jnp.array([0.5]), 3), ["`labels` has dtype float64"]),
    "no key": (
        lambda: CNF(affine, Normal(3), trace=Hutchinson()).log_prob(X),
        ["`key` is None", "jax.random.key(0)"],
    ),
    "data": (
        lambda: flow_likelihood(CNF(affine, Normal(3)), Batch(X), KEY),
        ["`batch.data`", "(examples, size)"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=mentions(words)):
        call()

"""Generators and known stochastic equations: their law, their calculus, their noise, bad input."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde._steps import KnotNoise
from nde._stochastic import Diffusion, correction, levy_area_of
from nde.hybrid import Positive
from nde.solvers import (
    SOSRI,
    LevyHeun,
    ReversibleAdjoint,
    ReversibleHeun,
    SpaceSpaceLevyArea,
    WithEstimates,
)

KEY = jax.random.key(0)
A, B = 0.5, 0.6  # geometric Brownian motion, Ito: dX = A X dt + B X dW
Y0 = jnp.array([1.0, 0.7])


def growth(calculus, **options):
    """Geometric Brownian motion, written in either calculus."""
    rate = A if calculus == "ito" else A - B**2 / 2
    return nde.HybridSDE(
        lambda t, y, p, args: p["rate"] * y,
        lambda t, y, p, args: p["noise"] * y,
        {"rate": rate, "noise": Positive(B)},
        calculus=calculus,
        **options,
    )


def noise_of(model):
    """The noise of a model of two entries as a model: dX = dW, whatever the state."""
    return nde.HybridSDE(
        lambda t, y, p, args: jnp.zeros_like(y),
        lambda t, y, p, args: jnp.ones_like(y),
        noise_type="additive",
        calculus=model.calculus,
        solver=model.solver,
        steps_per_interval=model.steps_per_interval,
        stepsize_controller=model.stepsize_controller,
    )


@eqx.filter_jit
def ends(model, ts, keys):
    """X and the exact solution at the end, of the same noise."""
    last = lambda model, y0, key: model(ts, y0, key=key)[-1]
    ys = jax.vmap(lambda key: last(model, Y0, key))(keys)
    ws = jax.vmap(lambda key: last(noise_of(model), jnp.zeros(2), key))(keys)
    return ys, Y0[None] * jnp.exp((A - B**2 / 2) * ts[-1] + B * ws)


def grid(steps, length=65):
    """That many steps on [0, 1] as times of one shape, padded at the end."""
    return jnp.asarray(np.minimum(np.arange(length) / steps, 1.0))


@pytest.mark.parametrize("calculus", ["ito", "stratonovich"])
@pytest.mark.parametrize(
    ("solver", "order"), [(diffrax.Euler(), 0.5), (diffrax.Heun(), 1.0), (SOSRI(), 1.5)]
)
def test_either_form_converges_to_one_solution_at_the_order_of_the_solver(solver, order, calculus):
    """Pathwise, so moments agree too. A drift in the wrong calculus leaves an error of about 0.2."""
    model, keys = growth(calculus, solver=solver), jax.random.split(KEY, 1024)
    steps, errors = np.array([8, 16, 32, 64]), []
    for n in steps:
        ys, exact = ends(model, grid(n), keys)
        errors.append(float(jnp.sqrt(jnp.mean((ys - exact) ** 2))))
    assert errors[-1] < 0.1
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15, (slope, errors)


def test_adaptive_steps_solve_for_the_noise_of_their_tree():
    """Irregular times, a solver's error estimate, the exact solution of the same noise."""
    ts = jnp.array([0.0, 0.1, 0.15, 0.7, 1.0])
    controller = diffrax.PIDController(3e-3, 3e-3, pcoeff=0.1, icoeff=0.3)
    model = growth("ito", steps_per_interval=None, stepsize_controller=controller, dt0=0.05)
    ys, exact = ends(model, ts, jax.random.split(KEY, 16))
    assert 0 < jnp.sqrt(jnp.mean((ys - exact) ** 2)) < 0.01


ROTATION = np.array([[0.0, -0.5], [0.5, 0.0]])
STRETCH = np.array([[0.4, 0.0], [0.2, -0.1]])


def test_noise_that_does_not_commute_has_the_moments_of_its_ito_form():
    """dX = -X dt + sum_j B_j X dW_j with a Stratonovich solver; d E[XX'] = (-2 M + sum B_j M B_j') dt."""
    columns = jnp.asarray(np.stack([ROTATION, STRETCH], axis=-1))
    model = nde.HybridSDE(
        lambda t, y, p, args: -y,
        lambda t, y, p, args: jnp.einsum("ijk,j->ik", columns, y),
        noise_type="general",
        calculus="ito",
    )
    assert np.abs(ROTATION @ STRETCH - STRETCH @ ROTATION).max() > 0.1
    y0, ts = np.array([1.0, -0.5]), jnp.linspace(0.0, 1.0, 65)
    run = jax.jit(jax.vmap(lambda key: model(ts, jnp.asarray(y0), key=key)[-1]))
    ys = np.asarray(run(jax.random.split(KEY, 8192)))
    moment = lambda m: -2 * m + ROTATION @ m @ ROTATION.T + STRETCH @ m @ STRETCH.T
    generator = np.stack([moment(e).ravel() for e in np.eye(4).reshape(4, 2, 2)], axis=1)
    second = (jax.scipy.linalg.expm(generator) @ np.outer(y0, y0).ravel()).reshape(2, 2)
    products = ys[:, :, None] * ys[:, None, :]
    for sample, exact in ((ys, y0 * np.exp(-1.0)), (products, second)):
        error = sample.std(axis=0) / np.sqrt(len(ys))
        assert np.all(np.abs(sample.mean(axis=0) - exact) < 4 * error + 2e-3)


def shapes_of_noise():
    """A diffusion of each type, that couples the entries of the state where it can."""
    coupled = lambda t, y, args: jnp.stack([jnp.sin(y[0] * y[1]), t * y[0] ** 2, y[2] * y[1]])
    matrix = lambda t, y, args: jnp.stack([coupled(t, y, args), jnp.exp(-(y**2))], axis=1)
    constant = lambda t, y, args: jnp.stack([t, 2 * t, 0 * t])
    return {"diagonal": coupled, "scalar": coupled, "general": matrix, "additive": constant}


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general", "additive"])
def test_the_change_of_calculus_is_the_derivative_of_the_diffusion(kind):
    field, y, t = shapes_of_noise()[kind], jnp.array([0.3, -1.2, 0.7]), jnp.array(0.4)
    got = correction(Diffusion(field, kind), t, y, None)
    sigma, slope = np.asarray(field(t, y, None)), np.asarray(jax.jacobian(field, 1)(t, y, None))
    expected = {
        "diagonal": lambda: sigma * np.diagonal(slope),
        "scalar": lambda: slope @ sigma,
        "general": lambda: np.einsum("ijk,kj->i", slope, sigma),
        "additive": lambda: np.zeros(3),
    }[kind]()
    np.testing.assert_allclose(got, expected / 2, rtol=1e-12, atol=1e-14)


def test_the_same_key_gives_the_same_path_single_or_batched():
    model, ts = growth("ito", solver=diffrax.Euler()), grid(16, 17)
    run = lambda key: model(ts, Y0, key=key)
    keys = jax.random.split(KEY, 8)
    batch = jax.jit(jax.vmap(run))(keys)
    for i in (0, 5):
        np.testing.assert_array_equal(run(keys[i]), batch[i])
        np.testing.assert_array_equal(jax.jit(run)(keys[i]), batch[i])
    assert len(np.unique(batch[:, -1, 0])) == 8


@functools.lru_cache
def revert(steps):
    return nde.HybridSDE(
        lambda t, y, p, args: -y,
        lambda t, y, p, args: jnp.full_like(y, 0.5),
        noise_type="additive",
        calculus="ito",
        solver=diffrax.Euler(),
        steps_per_interval=steps,
    )


@pytest.mark.parametrize("points", [9, 17])
def test_more_times_do_not_change_the_law(points):
    """The Euler law of dX = -X dt + 1/2 dW after 16 steps, exactly: mean q^16, variance a series."""
    ts = jnp.linspace(0.0, 1.0, points)
    run = jax.jit(jax.vmap(lambda key: revert(16 // (points - 1))(ts, Y0[:1], key=key)[-1]))
    ys = np.asarray(run(jax.random.split(KEY, 16384)))
    q = 1 - 1 / 16
    variance = 0.25 / 16 * sum(q ** (2 * k) for k in range(16))
    assert abs(ys.mean() - q**16) < 4 * np.sqrt(variance / len(ys))
    assert abs(ys.var() / variance - 1) < 4 * np.sqrt(2 / len(ys))


def test_noise_over_steps_has_the_law_of_its_lengths():
    """W ~ N(0, h), H ~ N(0, h/12), A of variance h^2/4, independent from step to step."""
    knots = jnp.array([0.0, 0.1, 0.15, 1.0, 1.0])

    @jax.vmap
    def draw(key):
        path = KnotNoise(knots, 2, (2,), key, SpaceSpaceLevyArea)
        ends = jnp.array([0.0, 0.05, 0.1, 0.125, 0.15, 0.575, 1.0])
        return jax.vmap(lambda a, b: path.evaluate(a, b, use_levy=True))(ends[:-1], ends[1:])

    n = 20000
    noise = jax.jit(draw)(jax.random.split(KEY, n))
    h = np.array([0.05, 0.05, 0.025, 0.025, 0.425, 0.425])
    for got, exact in (
        (noise.W[:, :, 0].var(0), h),
        (noise.H[:, :, 0].var(0), h / 12),
        (noise.A[:, :, 0, 1].var(0), h**2 / 4),
    ):
        np.testing.assert_allclose(got, exact, rtol=0.06)
    correlation = np.corrcoef(np.asarray(noise.W[:, :, 0]).T) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def generator(**options):
    keys = jax.random.split(KEY, 4)
    return nde.NeuralSDE(
        eqx.nn.Linear(2, 3, key=keys[0]),
        nde.fields.MLPField(3, 4, 1, time=True, context=1, key=keys[1]),
        nde.fields.MatrixField(3, 2, 4, 1, time=True, context=1, key=keys[2]),
        eqx.nn.Linear(3, 2, key=keys[3]),
        initial_noise=2,
        **options,
    )


def test_a_generator_that_unsteps_has_the_gradient_of_its_steps():
    """Also by its condition; with times that are irregular and padded."""
    ts = jnp.array([0.0, 0.2, 0.5, 1.0, 1.0])

    def gradient(adjoint):
        model = generator(solver=ReversibleHeun(), adjoint=adjoint, steps_per_interval=4)

        def loss(model_and_args, key):
            ys = model_and_args[0](ts, model_and_args[1], key=key)
            return jnp.mean(ys**2), ys

        grad = eqx.filter_value_and_grad(loss, has_aux=True)
        return eqx.filter_jit(grad)((model, jnp.ones(1)), KEY)

    (_, ys), got = gradient(ReversibleAdjoint())
    _, unrolled = gradient(diffrax.DirectAdjoint())
    assert ys.shape == (5, 2)
    np.testing.assert_array_equal(ys[4], ys[3])
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    assert np.all(got[1] != 0)


def with_shape(shape, noise_type, **options):
    options = {"calculus": "ito", "solver": diffrax.Euler()} | options
    return nde.HybridSDE(
        lambda t, y, p, args: -y,
        lambda t, y, p, args: jnp.ones(shape) * y[0],
        noise_type=noise_type,
        **options,
    )


@jax.custom_vjp
def opaque(x):
    return x


opaque.defvjp(lambda x: (x, None), lambda _, ct: (ct,))


def without_derivative():
    field = lambda t, y, p, args: opaque(y)
    return nde.HybridSDE(lambda t, y, p, args: y, field, calculus="ito")


TS, TWO = jnp.linspace(0.0, 1.0, 3), jnp.ones(2)
BAD = {
    "unsorted": (lambda: growth("ito")(TS[jnp.array([0, 2, 1])], TWO, key=KEY), ["`ts`", "order"]),
    "single": (lambda: growth("ito")(TS[:1], TWO, key=KEY), ["`ts` has one time", "at least two"]),
    "backwards": (lambda: growth("ito")(TS[::-1], TWO, key=KEY), ["`ts`", "forwards"]),
    "repeated": (
        lambda: growth("ito")(jnp.array([0.0, 0.0, 1.0]), TWO, key=KEY),
        ["`ts` repeats 0.0 at index 1", "padding"],
    ),
    "diagonal": (
        lambda: with_shape((2, 3), "diagonal")(TS, TWO, key=KEY),
        ["`diffusion`", "(2, 3)", "diagonal", "`noise_type`"],
    ),
    "general": (
        lambda: with_shape((2,), "general")(TS, TWO, key=KEY),
        ["`diffusion`", "(2,)", "general", "noise"],
    ),
    "additive": (
        lambda: with_shape((2,), "additive")(TS, TWO, key=KEY),
        ["`noise_type`", "additive", "depends on the state"],
    ),
    "no calculus": (
        lambda: growth("ito", solver=diffrax.Tsit5()),
        ["`solver` is Tsit5", "neither", "diffrax.Heun"],
    ),
    "no conversion": (
        lambda: without_derivative()(TS, TWO, key=KEY),
        ["`calculus`", "Heun", "derivative of `diffusion`", "diffrax.Euler"],
    ),
    "SOSRI": (
        lambda: with_shape((2, 3), "general", solver=SOSRI())(TS, TWO, key=KEY),
        ["SOSRI needs diagonal noise", "`diffusion`"],
    ),
    "no key": (lambda: growth("ito")(TS, TWO, key=None), ["`key` is None", "jax.random.key(0)"]),
    "keys": (
        lambda: generator()(TS, jnp.ones(1), key=jax.random.split(KEY, 2)),
        ["`key` is an array of shape (2,)", "one key"],
    ),
    "type": (lambda: with_shape((2,), "diag"), ["`noise_type` is 'diag'", '"diagonal"']),
    "calculus": (lambda: growth("strat"), ["`calculus` is 'strat'", '"stratonovich"']),
    "constant steps": (
        lambda: growth(
            "ito", steps_per_interval=None, stepsize_controller=diffrax.ConstantStepSize()
        )(TS, TWO, key=KEY),
        ["`stepsize_controller` is ConstantStepSize", "steps_per_interval=1"],
    ),
    "initial": (
        lambda: eqx.tree_at(lambda m: m.initial, generator(), eqx.nn.Linear(3, 3, key=KEY))(
            TS, jnp.ones(1), key=KEY
        ),
        ["`initial`", "`initial_noise`"],
    ),
    "half a step": (
        lambda: KnotNoise(TS, 1, (2,), KEY, diffrax.BrownianIncrement).evaluate(TS[0], TS[1] / 2),
        ["`steps_per_interval`", "another interval"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_is_wrong(case):
    call, words = BAD[case]
    with pytest.raises((ValueError, RuntimeError), match=mentions(words)):
        call()


def test_a_key_is_asked_for():
    with pytest.raises(TypeError, match="key"):
        growth("ito")(TS, TWO)


def test_each_solver_has_the_areas_it_asks_for():
    areas = {
        diffrax.Euler(): diffrax.BrownianIncrement,
        SOSRI(): diffrax.SpaceTimeLevyArea,
        diffrax.SPaRK(): diffrax.SpaceTimeLevyArea,
        LevyHeun(): SpaceSpaceLevyArea,
        WithEstimates(SOSRI()): diffrax.SpaceTimeLevyArea,
    }
    for solver, area in areas.items():
        assert levy_area_of(solver) is area

"""Implicit layers against closed forms, unrolled steps and long solves."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from messages import mentions

import nde
from nde import implicit

KEY = jax.random.key(0)
N = 6
W = 0.6 * jnp.linalg.qr(jax.random.normal(KEY, (N, N)))[0]  # all singular values 0.6
X = jax.random.normal(jax.random.fold_in(KEY, 1), (N,))


def cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


def total(args, gradient):
    found = implicit.fixed_point(cell, jnp.zeros(N), args, gradient=gradient)
    return jnp.sum(found.value * jnp.arange(1.0, N + 1))


@pytest.fixture(scope="module")
def unrolled():
    return jax.jit(jax.grad(lambda args: total(args, implicit.Unrolled(200))))((W, X))


def test_the_implicit_gradient_is_that_of_many_steps(unrolled):
    found = jax.jit(jax.grad(lambda args: total(args, implicit.Implicit())))((W, X))
    for ours, theirs in zip(found, unrolled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_cheap_gradients_are_their_formulas():
    z = implicit.fixed_point(cell, jnp.zeros(N), (W, X)).value
    weights = jnp.arange(1.0, N + 1)
    slope = (1 - z**2)[:, None] * W  # df/dz
    by_x = jnp.diag(1 - z**2)  # df/dx
    eye = jnp.eye(N)
    free = jax.grad(lambda x: total((W, x), implicit.JacobianFree()))(X)
    np.testing.assert_allclose(free, weights @ by_x, rtol=1e-9)
    phantom = jax.grad(lambda x: total((W, x), implicit.Phantom(3, 0.5)))(X)
    mixed = 0.5 * eye + 0.5 * slope
    expected = weights @ (eye + mixed + mixed @ mixed) @ (0.5 * by_x)
    np.testing.assert_allclose(phantom, expected, rtol=1e-9)


def test_statistics_say_how_the_solve_went():
    linear = lambda z, x: 0.5 * z + x
    found = implicit.fixed_point(linear, jnp.zeros(N), X)
    np.testing.assert_allclose(found.value, 2 * X, rtol=1e-10)
    np.testing.assert_allclose(found.stats["spectral_radius"], 0.5, rtol=1e-12)
    assert bool(found.converged) and float(found.stats["residual"]) < 1e-10
    # Iterating halves the error: log2(1/2e-12) = 39 steps, give or take the norm.
    assert 36 <= int(found.stats["iterations"]) <= 44
    rotation = 0.7 * jnp.array([[0.8, -0.6], [0.6, 0.8]])  # complex eigenvalues of modulus 0.7
    turned = implicit.fixed_point(lambda z, w: w @ z + 1, jnp.zeros(2), rotation)
    np.testing.assert_allclose(turned.stats["spectral_radius"], 0.7, rtol=1e-12)


def test_memory_does_not_grow_with_the_iterations():
    def residuals(gradient, max_steps):
        run = lambda args: (
            implicit.fixed_point(
                cell, jnp.zeros(N), args, gradient=gradient, max_steps=max_steps
            ).value
        )
        leaves = jax.tree.leaves(eqx.filter(jax.vjp(run, (W, X))[1], eqx.is_array))
        return sum(leaf.size for leaf in leaves)

    # Stepping through 32 iterations stores each; the implicit function theorem only the last point.
    assert residuals(implicit.Unrolled(32), 256) > 32 * N
    flat = residuals(implicit.Implicit(), 256)
    assert flat == residuals(implicit.Implicit(), 2048) and flat < 32 * N


def test_a_map_that_does_not_contract_says_so_and_newton_finds_its_point():
    grows = lambda z, x: 1.5 * z + x
    with pytest.raises(RuntimeError, match=mentions(["1.5", "Newton", "max_steps"])):
        implicit.fixed_point(grows, jnp.zeros(N), X, max_steps=30)
    failed = implicit.fixed_point(grows, jnp.zeros(N), X, max_steps=30, throw=False)
    assert not bool(failed.converged)
    np.testing.assert_allclose(failed.stats["spectral_radius"], 1.5, rtol=1e-9)
    newton = optimistix.Newton(rtol=1e-9, atol=1e-9)
    found = implicit.fixed_point(grows, jnp.zeros(N), X, solver=newton)
    np.testing.assert_allclose(found.value, -2 * X, rtol=1e-9)
    with pytest.raises(Exception, match="No fixed point"):
        jax.jit(lambda x: implicit.fixed_point(grows, jnp.zeros(N), x, max_steps=30).value)(X)


def toggle(t, y, args):
    """A genetic toggle switch: two genes, each of which represses the other."""
    a, b = args
    return jnp.stack([a / (1 + y[1] ** 2) - y[0], b / (1 + y[0] ** 2) - y[1]])


RATES = (jnp.array(3.0), jnp.array(2.5))
MODEL = nde.NeuralODE(toggle, stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10))


def test_the_gradient_of_a_steady_state_is_the_limit_of_long_solves():
    y0 = jnp.array([2.0, 0.1])

    def long(rates):
        return MODEL(jnp.array([0.0, 60.0]), y0, rates)[-1][0]

    def limit(rates):
        return implicit.steady_state(MODEL, y0, rates, horizon=5.0).value[0]

    found, expected = jax.grad(limit)(RATES), jax.grad(long)(RATES)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    state = implicit.steady_state(MODEL, y0, RATES, horizon=5.0)
    np.testing.assert_allclose(toggle(0.0, state.value, RATES), 0.0, atol=1e-11)
    assert float(state.stats["growth"]) < 0


def test_a_saddle_is_not_taken_for_a_steady_state():
    equal = (jnp.array(3.0), jnp.array(3.0))
    y0 = jnp.array([1.2, 1.2])  # the line of symmetry leads to the saddle
    with pytest.raises(RuntimeError, match=mentions(["unstable", "saddle"])):
        implicit.steady_state(MODEL, y0, equal, horizon=1.0)
    found = implicit.steady_state(MODEL, y0, equal, horizon=1.0, throw=False)
    y = found.value[0]  # 3/(1 + y^2) = y; eigenvalues -1 -+ 2 y^2/(1 + y^2)
    np.testing.assert_allclose(found.stats["growth"], -1 + 2 * y**2 / (1 + y**2), rtol=1e-9)


def test_the_jacobian_of_the_projection_onto_the_simplex():
    x = jnp.array([0.9, 0.4, -0.3, 0.35])
    objective = lambda z, x: 0.5 * jnp.sum((z - x) ** 2)

    def nearest(x):
        return implicit.argmin(
            objective, jnp.full(4, 0.25), x, project=implicit.project_simplex
        ).value

    support = np.asarray(nearest(x)) > 0
    assert support.tolist() == [True, True, False, True]
    expected = np.where(np.outer(support, support), np.eye(4) - 1 / 3, 0.0)
    np.testing.assert_allclose(jax.jacrev(nearest)(x), expected, atol=1e-10)
    np.testing.assert_allclose(jax.jacrev(implicit.project_simplex)(x), expected, atol=1e-10)


def test_the_jacobian_of_nonnegative_least_squares():
    A = jax.random.normal(KEY, (8, 4))
    b = A @ jnp.array([1.0, -1.0, 0.5, -0.2])
    objective = lambda x, b: 0.5 * jnp.sum((A @ x - b) ** 2)
    solve = lambda b: (
        implicit.argmin(objective, jnp.ones(4), b, project=lambda x: jnp.maximum(x, 0)).value
    )
    active = np.asarray(solve(b)) > 0
    assert 0 < active.sum() < 4
    expected = np.zeros((4, 8))
    block = np.asarray(A)[:, active]
    expected[active] = np.linalg.solve(block.T @ block, block.T)
    np.testing.assert_allclose(jax.jacrev(solve)(b), expected, atol=1e-10)


def test_the_derivative_of_ridge_regression():
    A = jax.random.normal(KEY, (8, 4))
    b = jnp.arange(8.0)

    def objective(x, weight):
        return 0.5 * jnp.sum((A @ x - b) ** 2) + 0.5 * weight * jnp.sum(x**2)

    solve = lambda weight: implicit.argmin(objective, jnp.zeros(4), weight).value
    weight = jnp.array(0.3)
    matrix = np.asarray(A).T @ np.asarray(A) + 0.3 * np.eye(4)
    x = np.linalg.solve(matrix, np.asarray(A).T @ np.asarray(b))
    np.testing.assert_allclose(solve(weight), x, rtol=1e-10)
    np.testing.assert_allclose(jax.jacrev(solve)(weight), -np.linalg.solve(matrix, x), atol=1e-10)


def test_a_function_without_a_minimum_says_so():
    with pytest.raises(RuntimeError, match=mentions(["No minimum", "unbounded"])):
        implicit.argmin(lambda x, _: jnp.sum(x + jnp.exp(x)), jnp.zeros(2))


def test_quadratic_programs_are_solved_and_infeasible_ones_refused():
    pytest.importorskip("qpax")
    y = jnp.array([0.9, 0.4, -0.3, 0.35])
    simplex = (jnp.ones((1, 4)), jnp.ones(1), -jnp.eye(4), jnp.zeros(4))
    solve = lambda y: implicit.quadratic_program(jnp.eye(4), -y, *simplex, smoothing=1e-9).value
    np.testing.assert_allclose(solve(y), implicit.project_simplex(y), atol=1e-5)
    expected = jax.jacrev(implicit.project_simplex)(y)
    # qpax's own backward pass is not written for strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jacobian = jax.jacrev(solve)(y)
    np.testing.assert_allclose(jacobian, expected, atol=1e-3)
    apart = (jnp.zeros((0, 1)), jnp.zeros(0), jnp.array([[1.0], [-1.0]]), jnp.array([-1.0, -1.0]))
    with pytest.raises(RuntimeError, match="exclude each other"):
        implicit.quadratic_program(jnp.eye(1), jnp.zeros(1), *apart)


def test_the_penalty_is_the_size_of_the_jacobian():
    """E |e^T J|^2 / n = |J|_F^2 / n: 0.36 for 0.6 times an orthogonal matrix."""
    linear = lambda z, x: W @ z + x
    draw = lambda key: nde.regularizers.equilibrium(linear, jnp.zeros(N), X, key=key)[1]
    mean = jnp.mean(jax.vmap(draw)(jax.random.split(KEY, 4000)))
    np.testing.assert_allclose(mean, 0.36, rtol=0.05)  # one draw has std 0.36 sqrt(2/6): 0.9 %
    solution, _ = nde.regularizers.equilibrium(linear, jnp.zeros(N), X, key=KEY)
    np.testing.assert_allclose(solution.value, jnp.linalg.solve(jnp.eye(N) - W, X), rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: implicit.fixed_point(lambda z, x: z[:2], X), ["`function`", "(6,)", "(2,)"]),
        (lambda: implicit.fixed_point(cell, X, (W, X), max_steps=0), ["`max_steps` is 0"]),
        (lambda: implicit.Unrolled(0), ["`steps` is 0"]),
        (lambda: implicit.Phantom(damping=1.5), ["`damping` is 1.5"]),
        (lambda: implicit.steady_state(MODEL, X[:2], RATES, horizon=0.0), ["`horizon` is 0.0"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=mentions(words)):
        call()

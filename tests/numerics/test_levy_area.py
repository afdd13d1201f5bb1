"""Space-space Levy area has the right law, and one solver turns it into strong order 1."""

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.stats
from sweeps import sweep

from nde.solvers.brownian import BrownianGrid, SpaceSpaceLevyArea, foster_area
from nde.solvers.methods.levy_heun import LevyHeun

KEY = jax.random.key(8)


def increments(n, channels=2, seed=0):
    w, h = jax.random.normal(jax.random.fold_in(KEY, seed), (2, n, channels))
    return diffrax.SpaceTimeLevyArea(dt=jnp.ones(n), W=w, H=h / np.sqrt(12))


def areas(method, n, seed=0):
    """A_12 for n unit intervals, and their (W, H)."""
    keys = jax.random.split(jax.random.fold_in(KEY, 100 + seed), n)
    x = increments(n, seed=seed)
    return np.asarray(jax.vmap(lambda x, k: method(x, key=k))(x, keys)[:, 0, 1]), x


def wrong_area(scale):
    """Areas with the bridge part too large: sigma^2 = h^2/12 per normal, as one published code has it."""

    def method(x, *, key):
        normals = scale * jax.random.normal(key, (x.W.size, x.W.size))
        mean = jnp.outer(x.H, x.W)
        return mean - mean.T + normals - normals.T

    return method


WRONG = {"bridge h^2/6": wrong_area(np.sqrt(1 / 12)), "no bridge": wrong_area(0.0)}
CDF = lambda x: 2 / np.pi * np.arctan(np.exp(np.pi * x))


def test_the_variance_is_a_quarter():
    n = 100_000
    a, _ = areas(foster_area, n)
    assert abs(np.var(a) - 0.25) < 0.25 * 5 * np.sqrt(4 / n)  # kurtosis 5


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_variance_is_noticed(name):
    n = 100_000
    a, _ = areas(WRONG[name], n)
    assert abs(np.var(a) - 0.25) > 0.25 * 5 * np.sqrt(4 / n)


def test_the_law_is_near_the_exact_one():
    # 1e4 numbers: the normal bridge is an approximation, and 5e5 would tell.
    a, _ = areas(foster_area, 10_000)
    assert scipy.stats.kstest(a, CDF).pvalue > 1e-4


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_law_is_noticed(name):
    a, _ = areas(WRONG[name], 10_000)
    assert scipy.stats.kstest(a, CDF).pvalue < 1e-4


def test_the_conditional_variance_is_the_stated_one():
    a, x = areas(foster_area, 200_000, seed=1)
    w, h = np.asarray(x.W), np.asarray(x.H)
    bridge = a - (h[:, 0] * w[:, 1] - w[:, 0] * h[:, 1])
    design = np.stack([np.ones(len(a)), (h**2).sum(axis=1)], axis=1)
    fit = np.linalg.lstsq(design, bridge**2, rcond=None)[0]
    np.testing.assert_allclose(fit, (1 / 20, 1 / 5), atol=0.02)
    assert abs(fit[0] - 1 / 20) < 0.003


def test_a_fine_path_has_the_conditional_variance_that_foster_uses():
    """W, H and A of the unit interval from 128 cells of W alone, by the textbook sums."""

    def one(key):
        d = jax.random.normal(key, (128, 2)) / np.sqrt(128)
        w = jnp.cumsum(d, axis=0)
        before = w - d
        h = jnp.mean(before + d / 2, axis=0) - w[-1] / 2
        a = jnp.sum(before[:, 0] * d[:, 1] - before[:, 1] * d[:, 0]) / 2
        return w[-1], h, a

    w, h, a = (np.asarray(x) for x in jax.jit(jax.vmap(one))(jax.random.split(KEY, 50_000)))
    bridge = a - (h[:, 0] * w[:, 1] - w[:, 0] * h[:, 1])
    design = np.stack([np.ones(len(a)), (h**2).sum(axis=1)], axis=1)
    fit = np.linalg.lstsq(design, bridge**2, rcond=None)[0]
    np.testing.assert_allclose(fit, [1 / 20, 1 / 5], atol=0.02)


def test_areas_are_antisymmetric_and_joined_cells_keep_the_variance():
    def joined(key):
        path = BrownianGrid(0.0, 1.0, 1 / 8, (3,), key, levy_area=SpaceSpaceLevyArea)
        return path.evaluate(0.0, 1.0, use_levy=True).A

    a = np.asarray(jax.jit(jax.vmap(joined))(jax.random.split(KEY, 20_000)))
    np.testing.assert_array_equal(a, -np.swapaxes(a, 1, 2))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert abs(np.var(a[:, i, j]) - 0.25) < 0.25 * 5 * np.sqrt(4 / 20_000)
    assert abs(np.corrcoef(a[:, 0, 1], a[:, 1, 2])[0, 1]) < 5 / np.sqrt(20_000)


def test_an_area_of_something_else_than_a_vector_is_an_error():
    x = diffrax.SpaceTimeLevyArea(dt=1.0, W=jnp.ones((2, 2)), H=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        foster_area(x, key=KEY)


# Strong order on noise that does not commute: dx = dW1 o, dy = x o dW2, and a nonlinear relative of it.


def drift(t, y, args):
    return jnp.stack([-y[1], 0.5 * jnp.sin(y[0])])


def diffusion(t, y, args):
    return jnp.stack(
        [jnp.stack([jnp.cos(y[1]), 0.3 * y[0]]), jnp.stack([0.2 * y[1], jnp.sin(y[0]) + 1.0])]
    )


LEVELS = [2.0**-3, 2.0**-4, 2.0**-5, 2.0**-6]


def squared_errors(solver, fine, paths):
    """All levels on one grid: W and A are joined from the cells of the reference."""

    def one(key):
        path = BrownianGrid(0.0, 1.0, fine, (2,), key, levy_area=SpaceSpaceLevyArea)
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
        y0 = jnp.array([0.4, 0.2])

        def end(method, dt):
            def body(y, i):
                t = i.astype(y.dtype) * dt
                return method.step(terms, t, t + dt, y, None, None, False)[0], None

            return jax.lax.scan(body, y0, jnp.arange(round(1 / dt)))[0]

        reference = end(LevyHeun(), fine)
        return jnp.stack([jnp.sum((end(solver, dt) - reference) ** 2) for dt in LEVELS])

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, paths))).T


def order_with_interval(squares, samples=400):
    """Regression slope over the levels, with its 95% bootstrap interval."""
    x = np.log2(LEVELS)

    def slope(columns):
        return np.polyfit(x, np.log2(np.sqrt(squares[:, columns].mean(axis=1))), 1)[0]

    paths = squares.shape[1]
    draws = np.random.default_rng(0).integers(0, paths, (samples, paths))
    return slope(np.arange(paths)), *np.quantile([slope(d) for d in draws], [0.025, 0.975])


SIZES = sweep([(1000, 2.0**-8), (4000, 2.0**-11)], (1000, 2.0**-8))


@pytest.mark.parametrize("paths, fine", SIZES)
def test_levy_heun_reaches_strong_order_one_where_heun_has_one_half(paths, fine):
    order, low, high = order_with_interval(squared_errors(LevyHeun(), fine, paths))
    assert 0.85 < low and high < 1.15, (order, low, high)
    order, low, high = order_with_interval(squared_errors(diffrax.Heun(), fine, paths))
    assert 0.35 < low and high < 0.65, (order, low, high)


@pytest.mark.slow
def test_the_wrong_sign_of_the_area_is_no_better_than_none():
    class Flipped(diffrax.AbstractPath):
        path: BrownianGrid

        @property
        def t0(self):
            return self.path.t0

        @property
        def t1(self):
            return self.path.t1

        def evaluate(self, t0, t1=None, left=True, use_levy=False):
            x = self.path.evaluate(t0, t1, left, use_levy)
            return SpaceSpaceLevyArea(x.dt, x.W, x.H, -x.A) if use_levy else x

    class FlippedHeun(diffrax.AbstractStratonovichSolver):
        term_structure = LevyHeun.term_structure
        interpolation_cls = LevyHeun.interpolation_cls

        def init(self, terms, t0, t1, y0, args):
            return None

        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            a, b = terms.terms
            flipped = diffrax.MultiTerm(a, diffrax.ControlTerm(b.vector_field, Flipped(b.control)))
            return LevyHeun().step(flipped, t0, t1, y0, args, solver_state, made_jump)

        def func(self, terms, t0, y0, args):
            return terms.vf(t0, y0, args)

    order, _, _ = order_with_interval(squared_errors(FlippedHeun(), 2.0**-8, 500))
    assert order < 0.65


def test_levy_heun_with_linear_operators_pytrees_and_diffeqsolve():
    path = BrownianGrid(0.0, 1.0, 1 / 16, (2,), KEY, levy_area=SpaceSpaceLevyArea)

    def solve(field):
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(field, path))
        return diffrax.diffeqsolve(terms, LevyHeun(), 0.0, 1.0, 1 / 16, jnp.array([0.4, 0.2])).ys[
            -1
        ]

    dense = solve(diffusion)
    operator = solve(lambda t, y, args: lx.MatrixLinearOperator(diffusion(t, y, args)))
    np.testing.assert_allclose(dense, operator, rtol=1e-13)
    # Exact for the noise that defines the area: x = W1, y = int x o dW2.
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: jnp.zeros(2)),
        diffrax.ControlTerm(
            lambda t, y, args: jnp.array([[1.0, 0.0], [0.0, 0.0]]).at[1, 1].set(y[0]), path
        ),
    )
    y1 = diffrax.diffeqsolve(terms, LevyHeun(), 0.0, 1.0, 1 / 4, jnp.zeros(2)).ys[-1]
    whole = path.evaluate(0.0, 1.0, use_levy=True)
    np.testing.assert_allclose(
        y1, [whole.W[0], whole.W[0] * whole.W[1] / 2 + whole.A[0, 1]], atol=1e-13
    )


def test_a_path_without_space_space_area_is_an_error():
    path = BrownianGrid(0.0, 1.0, 1 / 4, (2,), KEY)
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
    with pytest.raises(ValueError, match="levy_area=nde.solvers.SpaceSpaceLevyArea"):
        diffrax.diffeqsolve(terms, LevyHeun(), 0.0, 1.0, 1 / 4, jnp.zeros(2))

"""BrownianGrid: cells by number, joined and reversed, in diffrax's forms, with every solver and adjoint."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from sweeps import sweep

from nde.solvers.brownian import BrownianGrid, SpaceSpaceLevyArea

KEY = jax.random.key(5)
LEVY_AREAS = [diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, SpaceSpaceLevyArea]


def grid(levy_area=diffrax.BrownianIncrement, t0=0.0, t1=1.0, dt=0.1, shape=(3,)):
    return BrownianGrid(t0, t1, dt, shape, KEY, levy_area=levy_area)


@pytest.mark.parametrize("levy_area", LEVY_AREAS)
def test_a_cell_is_the_draw_of_a_hand_written_scan(levy_area):
    path = grid(levy_area)
    for n in (0, 3, 9):
        by_hand = jnp.sqrt(0.1) * jax.random.normal(jax.random.fold_in(KEY, n), (3,))
        np.testing.assert_array_equal(path.evaluate(n * 0.1, (n + 1) * 0.1), by_hand)
        np.testing.assert_array_equal(path.cell(n), by_hand)


@pytest.mark.parametrize("levy_area", LEVY_AREAS)
def test_cells_by_number_and_by_time_agree_bit_for_bit(levy_area):
    path = grid(levy_area)
    for n in (0, 4, 9):
        by_number, by_time = (
            path.cell(n, use_levy=True),
            path.evaluate(n * 0.1, (n + 1) * 0.1, use_levy=True),
        )
        assert type(by_time) is levy_area
        for x, y in zip(jax.tree.leaves(by_number), jax.tree.leaves(by_time), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-14)
        np.testing.assert_array_equal(by_number.W, by_time.W)


def test_several_cells_join_by_chens_relation():
    path = grid(SpaceSpaceLevyArea)
    parts = [path.cell(n, use_levy=True) for n in range(3, 7)]
    whole = path.evaluate(0.3, 0.7, use_levy=True)
    # Naively: the integrals of the piecewise path.
    w, integral, area = np.zeros(3), np.zeros(3), np.zeros((3, 3))
    for x in parts:
        integral = integral + 0.1 * (w + np.asarray(x.W) / 2 + np.asarray(x.H))
        area = area + np.asarray(x.A) + (np.outer(w, x.W) - np.outer(x.W, w)) / 2
        w = w + np.asarray(x.W)
    np.testing.assert_allclose(whole.W, w, atol=1e-14)
    np.testing.assert_allclose(whole.H, integral / 0.4 - w / 2, atol=1e-14)
    np.testing.assert_allclose(whole.A, area, atol=1e-14)


@pytest.mark.parametrize("levy_area", LEVY_AREAS)
def test_a_reversed_query_negates_the_increment_and_the_area_only(levy_area):
    path = grid(levy_area)
    there, back = path.evaluate(0.2, 0.6, use_levy=True), path.evaluate(0.6, 0.2, use_levy=True)
    np.testing.assert_array_equal(there.W, -back.W)
    np.testing.assert_allclose(there.dt, -back.dt)
    if levy_area is not diffrax.BrownianIncrement:
        np.testing.assert_array_equal(there.H, back.H)
    if levy_area is SpaceSpaceLevyArea:
        np.testing.assert_array_equal(there.A, -back.A)


def test_one_time_measures_from_the_start_and_an_empty_query_is_zero():
    path = grid(diffrax.SpaceTimeLevyArea, t0=1.0, t1=2.0)
    np.testing.assert_array_equal(path.evaluate(1.5), path.evaluate(1.0, 1.5))
    for t in (1.0, 1.3, 2.0):
        empty = path.evaluate(t, t, use_levy=True)
        np.testing.assert_array_equal(empty.W, np.zeros(3))
        np.testing.assert_array_equal(empty.H, np.zeros(3))


def test_a_shorter_last_cell_has_its_own_variance():
    path = grid(dt=0.3)  # cells 0.3, 0.3, 0.3, 0.1
    draw = jax.random.normal(jax.random.fold_in(KEY, 3), (3,))
    np.testing.assert_allclose(path.evaluate(0.9, 1.0), np.sqrt(0.1) * draw, rtol=1e-12)
    np.testing.assert_allclose(
        path.evaluate(0.0, 1.0), sum(path.cell(n) for n in range(4)), atol=1e-14
    )
    assert bool(jnp.all(jnp.isnan(path.cell(4)))) and bool(jnp.all(jnp.isnan(path.cell(-1))))


def test_rounding_does_not_open_a_sliver_of_a_cell_at_the_end():
    for cells in (3, 49, 1000):
        path = BrownianGrid(0.0, 1.0, 1 / cells, (), KEY)
        assert bool(jnp.isnan(path.cell(cells))) and not bool(jnp.isnan(path.cell(cells - 1)))
        last = np.sqrt(1 / cells) * jax.random.normal(jax.random.fold_in(KEY, cells - 1), ())
        np.testing.assert_array_equal(path.evaluate(1 - 1 / cells, 1.0), last)


def test_pytrees_have_the_shapes_and_types_of_diffrax():
    leaves = jax.ShapeDtypeStruct((2, 3), jnp.float64), jax.ShapeDtypeStruct((), jnp.float16)
    shape = {"a": leaves[0], "b": leaves[1]}
    for levy_area in LEVY_AREAS[:2]:
        ours = BrownianGrid(0.0, 1.0, 0.25, shape, KEY, levy_area=levy_area)
        theirs = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, shape, KEY, levy_area=levy_area)
        for use_levy in (False, True):
            x, y = (
                jax.eval_shape(lambda p=p, u=use_levy: p.evaluate(0.25, 0.75, use_levy=u))
                for p in (ours, theirs)
            )
            assert jax.tree.structure(x) == jax.tree.structure(y)
            assert jax.tree.leaves(x) == jax.tree.leaves(y)
    values, flat = ours.cell(2), BrownianGrid(0.0, 1.0, 0.25, (7,), KEY).cell(2)
    np.testing.assert_array_equal(values["a"].ravel(), flat[:6])
    np.testing.assert_array_equal(values["b"], flat[6].astype(jnp.float16))


def test_times_that_are_traced_give_the_same_bits():
    def query(t0, t1, dt, s, t):
        return BrownianGrid(t0, t1, dt, (3,), KEY).evaluate(s, t)

    expected = grid().evaluate(0.2, 0.7)
    np.testing.assert_array_equal(jax.jit(query)(0.0, 1.0, 0.1, 0.2, 0.7), expected)
    lanes = jax.vmap(lambda s: query(0.0, 1.0, 0.1, s, s + 0.1))(jnp.array([0.2, 0.5, 0.1]))
    np.testing.assert_array_equal(lanes[1], grid().evaluate(0.5, 0.6))


@pytest.mark.parametrize(
    "query", [(0.05, 0.1), (0.0, 0.17), (0.1, 0.201), (-0.1, 0.1), (0.9, 1.1), (float("nan"), 0.1)]
)
def test_a_query_off_the_grid_is_an_error(query):
    with pytest.raises(ValueError, match="BrownianInterval") as known:
        grid().evaluate(*query)
    assert str(query[1]) in str(known.value)
    with pytest.raises(RuntimeError, match="spacing `dt`=0.1"):
        jax.block_until_ready(eqx.filter_jit(grid().evaluate)(*map(jnp.asarray, query)))


@pytest.mark.parametrize("t0, t1, dt, match", [
    (1.0, 1.0, 0.1, r"\[1.0, 1.0\] is empty"),
    (1.0, 0.0, 0.1, r"\[1.0, 0.0\] is empty"),
    (0.0, 1.0, 0.0, "`dt` of BrownianGrid is 0.0"),
    (0.0, 1.0, -0.1, "`dt` of BrownianGrid is -0.1"),
])  # fmt: skip
def test_an_empty_grid_is_an_error(t0, t1, dt, match):
    with pytest.raises(ValueError, match=match):
        BrownianGrid(t0, t1, dt, (3,), KEY)


@pytest.mark.parametrize("key", [0, None, jax.random.split(KEY, 3), jnp.zeros(2)])
def test_a_key_that_is_not_one_key_is_an_error(key):
    with pytest.raises(ValueError, match=r"`key` of BrownianGrid .* jax.random.key\(0\)"):
        BrownianGrid(0.0, 1.0, 0.1, (3,), key)


def test_shapes_and_areas_that_cannot_be_made_are_errors():
    with pytest.raises(ValueError, match="real and floating-point"):
        BrownianGrid(0.0, 1.0, 0.1, jax.ShapeDtypeStruct((2,), jnp.int32), KEY)
    with pytest.raises(ValueError, match="one vector of channels"):
        BrownianGrid(0.0, 1.0, 0.1, (2, 2), KEY, levy_area=SpaceSpaceLevyArea)
    with pytest.raises(ValueError, match="it makes only"):
        BrownianGrid(0.0, 1.0, 0.1, (2,), KEY, levy_area=diffrax.SpaceTimeTimeLevyArea)


SOLVERS = [
    diffrax.Heun(),
    diffrax.ReversibleHeun(),
    diffrax.EulerHeun(),
    diffrax.SPaRK(),
    diffrax.ItoMilstein(),
]


def by_hand(solver, path, steps, y0, terms):
    """The solve as a plain loop over the solver's own step."""
    dt = 1 / steps
    state = solver.init(terms, 0.0, dt, y0, None)
    y = y0
    for n in range(steps):
        y, _, _, state, _ = solver.step(terms, n * dt, (n + 1) * dt, y, None, state, False)
    return y


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_diffrax_solvers_take_the_increments_of_the_cells(solver):
    path = BrownianGrid(0.0, 1.0, 0.125, (2,), KEY, levy_area=diffrax.SpaceTimeLevyArea)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(lambda t, y, args: lx.DiagonalLinearOperator(0.5 * y), path),
    )
    y0 = jnp.array([1.0, 2.0])
    with jax.numpy_dtype_promotion("standard"):  # some of diffrax's solvers promote
        y1 = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.125, y0).ys[-1]
        expected = by_hand(solver, path, 8, y0, terms)
    np.testing.assert_allclose(y1, expected, rtol=1e-12)


ADJOINTS = [
    diffrax.RecursiveCheckpointAdjoint(),
    pytest.param(diffrax.BacksolveAdjoint(), marks=pytest.mark.slow),
    pytest.param(diffrax.DirectAdjoint(), marks=pytest.mark.slow),
    pytest.param(diffrax.ForwardMode(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("backwards", sweep([False, True], False))
def test_gradients_pass_through_with_every_adjoint(adjoint, backwards):
    t0, t1 = (1.0, 0.0) if backwards else (0.0, 1.0)
    path = BrownianGrid(0.0, 1.0, 1 / 64, (), KEY)

    def solve(scale):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, scale: -y),
            diffrax.ControlTerm(lambda t, y, scale: scale * y, path),
        )
        return diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            t0,
            t1,
            (t1 - t0) / 64,
            jnp.array(1.0),
            args=scale,
            adjoint=adjoint,
        ).ys[-1]

    scale = jnp.array(0.3)
    grad = jax.jacfwd(solve) if isinstance(adjoint, diffrax.ForwardMode) else jax.grad(solve)
    # Stratonovich: y1 = exp(-(t1 - t0) + scale (W(t1) - W(t0))).
    w = path.evaluate(t0, t1)
    exact = w * jnp.exp(-(t1 - t0) + scale * w)
    np.testing.assert_allclose(grad(scale), exact, rtol=2e-2)


def test_a_gradient_with_respect_to_time_is_refused():
    with pytest.raises(ValueError, match="no gradient with respect to the times"):
        jax.grad(lambda t: jnp.sum(grid().evaluate(0.0, t)))(0.5)

"""`LinearCDE`: the recurrence against a naive loop, the steps against known exponentials."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sweeps import sweep

from nde.linear_cde import (
    LinearCDE,
    by_platform,
    differences,
    exponential,
    first_order,
    in_chunks,
    in_order,
    integral,
    orthogonal,
)

KEY = jax.random.key(0)
TIMES, CHANNELS, HIDDEN = 33, 2, 12
TS = jnp.cumsum(jax.random.uniform(jax.random.key(1), (TIMES,)))
YS = jax.random.normal(jax.random.key(2), (TIMES, CHANNELS))
BLOCKS = [1, 4, 12]  # diagonal to dense; the last is above `WRITTEN_OUT`
RECURRENCES = [in_order, in_chunks]


def make(block=4, **options):
    return LinearCDE(CHANNELS, HIDDEN, 3, block=block, key=KEY, **options)


def naive(generators, increments, start):
    """One dense matrix per interval, from the blocks, and a Python loop; the states at all times."""
    size, lanes = start.shape
    h, found = start.T.ravel(), [start]
    for dw in increments:
        blocks = sum(a * x for a, x in zip(generators, dw, strict=True))
        matrix = scipy.linalg.block_diag(*(blocks[:, :, lane] for lane in range(lanes)))
        h = h + matrix @ h
        found.append(h.reshape(lanes, size).T)
    return np.stack(found)


def problem(block, intervals, dtype=float):
    """A random walk drives a state of order one, whatever the number of intervals."""
    keys = jax.random.split(jax.random.key(block), 3)
    lanes = HIDDEN // block
    generators = jax.random.normal(keys[0], (3, block, block, lanes), dtype=dtype) / block**0.5
    increments = jax.random.normal(keys[1], (intervals, 3), dtype=dtype) / intervals**0.5
    return generators, increments, 1 + jax.random.uniform(keys[2], (block, lanes), dtype=dtype)


def states_of(recurrence, step=first_order):
    def solve(generators, increments, start):
        end, before = recurrence(step, generators, increments, start)
        return jnp.concatenate([before, end[None]])

    return solve


@jax.jit
def every_way(*arguments):
    return [states_of(way)(*arguments) for way in (*RECURRENCES, by_platform)]


@pytest.mark.parametrize("block", sweep(BLOCKS, 1, 4))
@pytest.mark.parametrize("intervals", [1, 37])  # less than one per chunk, and chunks with padding
def test_every_way_equals_the_loop(block, intervals):
    arguments = problem(block, intervals)
    expected = naive(*map(np.asarray, arguments))
    tolerance = 1e-13 * np.abs(expected).max()
    for found in every_way(*arguments):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "block, dtype, tolerance", [(4, jnp.float32, 1e-5), (1, jnp.float64, 1e-12)]
)
def test_chunks_equal_the_loop_on_a_long_series(block, dtype, tolerance):
    arguments = problem(block, 2000, dtype)
    expected = naive(*(np.asarray(x, dtype=float) for x in arguments))
    assert np.abs(expected[-1] - expected[0]).max() > 0.5
    found = np.asarray(jax.jit(states_of(in_chunks))(*arguments))
    error = np.abs(found - expected).max()
    assert error < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("block", sweep([1, 4, 12], 4))
def test_gradients_equal_autodiff_of_the_loop(block):
    arguments = problem(block, 18)
    weights = jax.random.normal(KEY, (19, *arguments[2].shape))

    def loop(generators, increments, start):
        h, found = start, [start]
        for dw in increments:
            h = h + jnp.einsum("c,cijn,jn->in", dw, generators, h)
            found.append(h)
        return jnp.stack(found)

    def loss(solve, *arguments):
        return jnp.sum(weights * solve(*arguments) ** 2)

    @jax.jit
    def gradients(*arguments):
        ways = [loop, *map(states_of, RECURRENCES)]
        return [jax.grad(loss, argnums=(1, 2, 3))(way, *arguments) for way in ways]

    wanted, *given = gradients(*arguments)
    for way in given:
        for a, b in zip(way, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * np.abs(b).max())


def test_a_gradient_has_a_gradient():
    generators, *others = problem(2, 18)

    def norm(solve, scale):
        inner = jax.grad(lambda a: jnp.sum(solve(a, *others) ** 2))(scale * generators)
        return jnp.sum(inner**2)

    @jax.jit
    def slopes_and_norms(low, high):
        ways = [states_of(recurrence) for recurrence in RECURRENCES]
        slopes = jnp.stack([jax.grad(norm, argnums=1)(way, (low + high) / 2) for way in ways])
        return slopes, norm(ways[0], low), norm(ways[0], high)

    step = 1e-5
    slopes, low, high = slopes_and_norms(0.7 - step, 0.7 + step)
    central = (high - low) / (2 * step)
    np.testing.assert_allclose(slopes, central, rtol=1e-6)


exponentials = jax.jit(exponential)
rotations = jax.jit(orthogonal)
states = eqx.filter_jit(lambda layer, ts, xs: layer.states(ts, xs))


@pytest.mark.parametrize("size", BLOCKS)
def test_exponential_equals_scipy(size):
    """Up to the norm that the docstring names."""
    start = np.array(jax.random.normal(KEY, (size, size, 6)))
    for norm in (1e-3, 1.0, 12.0):
        generator = start * norm / np.abs(start).sum(axis=0).max()
        given = exponentials(jnp.asarray(generator))
        for lane in range(6):
            expected = scipy.linalg.expm(generator[:, :, lane])
            tolerance = 1e-13 * max(1.0, np.abs(expected).max())
            found = np.eye(size) + given[:, :, lane]
            np.testing.assert_allclose(found, expected, atol=tolerance, rtol=1e-12)


def test_nothing_is_lost_of_a_small_exponential():
    generator = 1e-9 * np.array(jax.random.normal(KEY, (4, 4, 3)))
    expected = generator + np.einsum("ijn,jkn->ikn", generator, generator) / 2
    given = exponentials(jnp.asarray(generator))
    np.testing.assert_allclose(given, expected, rtol=1e-14, atol=1e-14 * np.abs(generator).max())


def test_the_gradient_of_the_exponential_is_that_of_jax():
    generator, weights = jax.random.normal(KEY, (2, 4, 4))

    @jax.jit
    def gradients(generator):
        def ours(b):
            return jnp.sum(weights * exponential(b[:, :, None])[:, :, 0])

        def theirs(b):
            return jnp.sum(weights * jax.scipy.linalg.expm(b))

        return jax.grad(ours)(generator), jax.grad(theirs)(generator)

    np.testing.assert_allclose(*gradients(generator), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [2, 3])
def test_orthogonal_turns(size):
    generator = 3 * np.array(jax.random.normal(KEY, (size, size, 5)))
    given = rotations(jnp.asarray(generator))
    for lane in range(5):
        matrix = np.eye(size) + given[:, :, lane]
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
        assert np.linalg.det(matrix) > 0
        skew = generator[:, :, lane] - generator[:, :, lane].T
        np.testing.assert_allclose(matrix, scipy.linalg.expm(skew), atol=1e-12)


def test_a_block_of_one_cannot_turn():
    with pytest.raises(ValueError, match="Use `block` >= 2"):
        make(1, step=orthogonal)


def test_exponential_is_exact_in_between_and_first_order_is_not():
    ts, ys = TS[:3], YS[:3]  # a refinement of a linear path changes nothing for a CDE
    fine_ts = jnp.interp(jnp.arange(9) / 4, jnp.arange(3.0), ts)
    fine_ys = jax.vmap(lambda y: jnp.interp(jnp.arange(9) / 4, jnp.arange(3.0), y), 1, 1)(ys)
    gaps = {}
    for step in (exponential, first_order):
        layer = make(step=step).layers[0]
        coarse, fine = states(layer, ts, ys), states(layer, fine_ts, fine_ys)[::4]
        gaps[step] = float(jnp.abs(coarse - fine).max())
    assert gaps[exponential] < 1e-13
    assert gaps[first_order] > 1e-2


def test_states_equal_the_equation_written_out():
    for driver, increments in (
        (differences, np.diff(np.column_stack([TS, YS]), axis=0)),
        (integral, np.diff(TS)[:, None] * np.column_stack([np.ones(TIMES), YS])[1:]),
    ):
        layer = make(driver=driver).layers[0]
        h = np.asarray(layer.initial(YS[0])).reshape(4, 3)
        for dw in increments:
            matrix = np.einsum("c,cijn->ijn", dw, np.asarray(layer.generators))
            h = h + np.einsum("ijn,jn->in", matrix, h)
        np.testing.assert_allclose(states(layer, TS, YS)[-1], np.ravel(h), rtol=1e-10)


@eqx.filter_jit
def trajectory(model, ts, ys):
    return model.trajectory(ts, ys)


@eqx.filter_jit
def batch(model, ts, ys):
    return jax.vmap(model, in_axes=(None, 0))(ts, ys)


@eqx.filter_jit
def final(model, ts, ys):
    return model(ts, ys)


def test_outputs_know_the_past_alone():
    model = make()
    outputs = trajectory(model, TS, YS)
    np.testing.assert_allclose(outputs[-1], final(model, TS, YS), rtol=1e-12)
    changed = trajectory(model, TS, YS.at[20:].add(1.0))
    np.testing.assert_array_equal(outputs[:20], changed[:20])
    assert np.all(np.abs(outputs[20:] - changed[20:]).max(axis=1) > 1e-6)


@pytest.mark.parametrize(
    "driver, step, recurrence",
    [(differences, exponential, RECURRENCES[0]), (integral, first_order, RECURRENCES[1])],
)
def test_padding_changes_nothing(driver, step, recurrence):
    model = make(2, driver=driver, step=step, recurrence=recurrence, init_std=0.2)
    ts = jnp.asarray(np.pad(TS, [(0, 11)], mode="edge"))
    ys = jnp.asarray(np.pad(YS, [(0, 11), (0, 0)], mode="edge"))
    outputs, unpadded = trajectory(model, ts, ys), trajectory(model, TS, YS)
    np.testing.assert_allclose(outputs[:TIMES], unpadded, rtol=1e-12, atol=1e-12)
    still = np.tile(unpadded[-1], (11, 1))
    np.testing.assert_allclose(outputs[TIMES:], still, rtol=1e-12, atol=1e-12)


def test_a_diagonal_layer_forgets_the_order_of_its_input():
    """Two increments in either order: equal states, unless blocks do not commute."""
    order = jnp.array([0, 2, 1])
    steps = jnp.array([[0.0, 0.0], [0.3, -0.2], [-0.1, 0.4]])
    ts = jnp.arange(3.0)
    for block, step in ((1, first_order), (1, exponential), (2, first_order), (2, exponential)):
        layer = make(block, step=step).layers[0]
        one, other = (states(layer, ts, jnp.cumsum(x, 0))[-1] for x in (steps, steps[order]))
        gap = float(jnp.abs(one - other).max())
        assert gap < 1e-14 if block == 1 else gap > 1e-3


def icosahedron():
    """Two rotations that make the group A5, as generators (skew-symmetric matrices)."""

    def generator(axis, angle):
        x, y, z = angle * np.array(axis) / np.linalg.norm(axis)
        return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])

    golden = (1 + np.sqrt(5)) / 2
    return generator((0, 1, golden), 2 * np.pi / 5), generator((1, 1, 1), 2 * np.pi / 3)


def test_blocks_of_three_hold_a5_over_a_thousand_tokens():
    generators = icosahedron()
    tokens = np.random.default_rng(0).integers(0, 2, 1000)
    matrices = [scipy.linalg.expm(g) for g in generators]
    layer = LinearCDE(2, 3, 1, block=3, driver=integral, step=exponential, key=KEY).layers[0]
    weights = jnp.stack([jnp.zeros((3, 3)), *map(jnp.asarray, generators)])[..., None]
    layer = eqx.tree_at(lambda layer: layer.generators, layer, weights)
    layer = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, layer)
    xs = jax.nn.one_hot(tokens, 2, dtype=jnp.float32)
    found = states(layer, jnp.arange(1000, dtype=jnp.float32), xs)
    expected = [np.asarray(found[0], dtype=float)]
    for token in tokens[1:]:
        expected.append(matrices[token] @ expected[-1])
    assert len(np.unique(np.round(expected, 6), axis=0)) == 60  # the whole group was visited
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_batch_is_vmap_under_jit():
    model = make()
    ys = jnp.stack([YS, 2 * YS])
    alone = jnp.stack([final(model, TS, y) for y in ys])
    np.testing.assert_allclose(batch(model, TS, ys), alone, rtol=1e-10)


def test_a_gradient_reaches_every_weight():
    def loss(model):
        return jnp.sum(model(TS, YS) ** 2)

    grads = jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(make()))
    assert len(grads) == 2 * 9 + 2
    assert all(float(jnp.abs(g).max()) > 0 for g in grads)


MODEL = make()
BAD_SERIES = {
    "no time": (TS[:0], YS[:0], "at least one time"),
    "one time": (TS[:1], YS[:1], "at least two rows"),
    "unsorted": (TS[::-1].at[0].set(0.0), YS, "not in order"),
    "backward": (TS[::-1], YS, "runs backward"),
    "time is nan": (TS.at[3].set(jnp.nan), YS, "nan at index 3"),
    "channels": (TS, YS[:, :1], r"\(33, 1\).*expects \(33, 2\)"),
    "batch": (TS, YS[None], "vmap"),
    "lengths": (TS[:-1], YS, r"\(33, 2\).*expects \(32, 2\)"),
    "nan": (TS, YS.at[4, 1].set(jnp.nan), "nan at time 4, channel 1"),
    "integers": (TS, YS.astype(int), "floating array"),
    "a list": (TS, YS.tolist(), "`ys` is list"),
}


@pytest.mark.parametrize("case", BAD_SERIES)
def test_a_bad_series_is_refused(case):
    ts, ys, message = BAD_SERIES[case]
    with pytest.raises(ValueError, match=message):
        MODEL(ts, ys)


@pytest.mark.parametrize("case", ["nan", "time is nan", "unsorted"])
def test_a_bad_series_is_refused_in_a_transformation_too(case):
    ts, ys, _ = BAD_SERIES[case]
    message = (
        "`ys` must be finite; fill gaps first: nde.paths.fill_gaps" if case == "nan" else "`ts`"
    )
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(batch(MODEL, ts, jnp.stack([YS, ys])))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": 5}, r"does not divide `hidden` = 12; give one of \[1, 2, 3, 4, 6, 12\]"),
        ({"block": 0}, "`block` is 0"),
        ({"depth": 1.0}, "`depth` is 1.0"),
        ({"driver": "integral"}, "`driver` is 'integral'"),
        ({"step": differences}, r"called as step\(generator\)"),
        ({"step": lambda b: 1 + b}, "does not make 0 of 0. It gives M - 1"),
        ({"step": lambda b: b[0]}, r"makes \(4, 1\) of a generator of shape \(4, 4, 1\)"),
    ],
)
def test_a_bad_model_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)

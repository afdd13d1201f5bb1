"""BrownianInterval: one path whatever is asked in whatever order, and cheap to follow."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import sweep

from nde.solvers.brownian import BrownianInterval, threefry

KEY = jax.random.key(11)
LEVY_AREAS = [diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea]


def interval(
    levy_area=diffrax.BrownianIncrement, t0=0.0, t1=1.0, tol=2.0**-12, shape=(2,), key=KEY
):
    return BrownianInterval(t0, t1, shape, key, levy_area=levy_area, tol=tol)


@eqx.filter_jit
def compiled(method, *args):
    return method(*args, use_levy=True)


def evaluate(path, s, t):
    return compiled(
        path.evaluate, jnp.asarray(s), jnp.asarray(t)
    )  # arrays: else one compilation each


def advance(path, s, t, state):
    return compiled(path.draw, jnp.asarray(s), jnp.asarray(t), state)


def numbers(increment):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(increment)])


def random_queries(count, seed, nodes=False):
    """Intervals longer than a leaf, of all sizes."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(2.0**-11), np.log(0.5), count))
    starts = rng.uniform(0, 1 - lengths)
    queries = np.stack([starts, starts + lengths], axis=1)
    return np.round(queries * 4096) / 4096 if nodes else queries


@pytest.mark.parametrize("levy_area", LEVY_AREAS)
@pytest.mark.parametrize("nodes", [True, False], ids=["nodes", "inside leaves"])
def test_500_queries_in_10_orders_give_the_same_bits(levy_area, nodes):
    path = interval(levy_area)
    queries = random_queries(500, 0, nodes)
    alone = np.stack([numbers(evaluate(path, s, t)) for s, t in queries])

    @eqx.filter_jit
    def in_order(path, queries):
        def body(state, query):
            increment, state = path.draw(query[0], query[1], state, use_levy=True)
            return state, increment

        return jax.lax.scan(body, path.init(), queries)[1]

    for seed in range(10):
        order = np.random.default_rng(seed).permutation(500)
        reverse = slice(None, None, -1 if seed % 2 else 1)
        increments = in_order(path, jnp.asarray(queries[order][:, reverse]))
        for x, y in zip(jax.tree.leaves(increments), alone_leaves(path, alone), strict=True):
            flip = -1 if seed % 2 and x.ndim and not is_area(path, x, increments) else 1
            np.testing.assert_array_equal(np.asarray(x), flip * y[order].reshape(x.shape))


def alone_leaves(path, alone):
    """The columns of `alone`, cut as the leaves of an increment: dt, W (and H)."""
    yield alone[:, 0]
    for start in range(1, alone.shape[1], 2):
        yield alone[:, start : start + 2]


def is_area(path, x, increments):
    return path.levy_area is diffrax.SpaceTimeLevyArea and x is increments.H


@pytest.mark.slow
def test_a_query_does_not_notice_100000_others():
    path = interval(diffrax.SpaceTimeLevyArea)
    queries = jnp.asarray(random_queries(100_000, 1))

    @eqx.filter_jit
    def after(path, state):
        def body(state, query):
            return path.draw(query[0], query[1], state)[1], None

        return jax.lax.scan(body, state, queries)[0]

    before, state = advance(path, 0.123, 0.456, path.init())
    again, _ = advance(path, 0.123, 0.456, after(path, state))
    np.testing.assert_array_equal(numbers(before), numbers(again))


@pytest.mark.parametrize("levy_area", sweep(LEVY_AREAS, diffrax.SpaceTimeLevyArea))
def test_lanes_and_single_paths_give_the_same_bits(levy_area):
    keys = jax.random.split(KEY, 7)
    queries = random_queries(20, 2)

    def follow(key):
        path = interval(levy_area, key=key)

        def body(state, query):
            increment, state = path.draw(query[0], query[1], state, use_levy=True)
            return state, increment

        return jax.lax.scan(body, path.init(), jnp.asarray(queries))[1]

    lanes = jax.jit(jax.vmap(follow))(keys)
    for i, key in enumerate(keys):
        one = jax.jit(follow)(key)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(lanes), strict=True):
            np.testing.assert_array_equal(x, y[i])
    # Lanes that stand at different places as well.
    path = interval(levy_area)
    at_once = jax.vmap(lambda q: path.evaluate(q[0], q[1]))(jnp.asarray(queries))
    alone = np.stack([evaluate(path, s, t).W for s, t in queries])
    np.testing.assert_array_equal(at_once, alone)


cuts = st.floats(0.0, 1.0, allow_nan=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.tuples(cuts, cuts, cuts))
def test_neighbors_add_up(times):
    s, t, u = sorted(times)
    if min(t - s, u - t) < 2 * 2.0**-12:
        return
    path = interval(diffrax.SpaceTimeLevyArea)
    first, second, whole = evaluate(path, s, t), evaluate(path, t, u), evaluate(path, s, u)
    size = np.maximum.reduce(
        [np.abs(first.W), np.abs(second.W), np.abs(whole.W), np.ones(2) * 0.05]
    )
    assert np.all(np.abs(first.W + second.W - whole.W) <= 16 * np.spacing(size))
    integrals = [x.dt * (x.W / 2 + x.H) for x in (first, second, whole)]
    np.testing.assert_allclose(
        integrals[0] + integrals[1] + second.dt * first.W, integrals[2], atol=1e-6 * (u - s)
    )


@pytest.mark.parametrize("levy_area", LEVY_AREAS)
def test_the_whole_interval_is_the_sum_of_its_halves(levy_area):
    path = interval(levy_area)
    whole = evaluate(path, 0.0, 1.0).W
    assert bool(jnp.all(whole != 0))
    halves = evaluate(path, 0.0, 0.5).W + evaluate(path, 0.5, 1.0).W
    np.testing.assert_allclose(whole, halves, rtol=1e-15, atol=1e-15)


def test_reversed_queries_negate_w_and_keep_h():
    path = interval(diffrax.SpaceTimeLevyArea)
    there, back = evaluate(path, 0.2, 0.7), evaluate(path, 0.7, 0.2)
    np.testing.assert_array_equal(there.W, -back.W)
    np.testing.assert_array_equal(there.H, back.H)
    assert back.dt == -there.dt


def test_one_time_measures_from_the_start_and_an_empty_query_is_zero():
    path = interval(diffrax.SpaceTimeLevyArea, t0=-1.0, t1=3.0)
    np.testing.assert_array_equal(path.evaluate(0.5), path.evaluate(-1.0, 0.5))
    for t in (-1.0, 0.3, 3.0):
        empty = path.evaluate(t, t, use_levy=True)
        np.testing.assert_array_equal(empty.W, np.zeros(2))
        np.testing.assert_array_equal(empty.H, np.zeros(2))


def sequential(path, bits, steps, seed, dtype):
    """Follows the path with steps near 1/200 that vary by 30 per cent; the ends, and draws a query."""
    factors = np.exp(0.3 * np.random.default_rng(seed).normal(size=steps))
    lengths = jnp.asarray(factors / factors.sum(), dtype)

    def body(carry, length):
        t, state = carry
        end = jnp.minimum(t + length, jnp.ones((), dtype))
        if bits is not None:
            end = path.round_down(t, end, bits=bits)
        _, state = path.draw(t, end, state)
        return (end, state), end

    start = (jnp.zeros((), dtype), path.init())
    (_, state), ends = jax.lax.scan(body, start, lengths)
    return np.asarray(ends), float(state.draws) / steps


@pytest.mark.parametrize("levy_area", LEVY_AREAS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_following_a_path_costs_at_most_6_draws_a_query(levy_area, dtype):
    path = interval(levy_area, tol=2.0**-20)
    _, rounded = sequential(path, 3, 200, 0, dtype)
    _, unrounded = sequential(path, None, 200, 0, dtype)
    assert (
        rounded < 6 < unrounded
    )  # the second is the negative control: rounding is what makes it cheap


def test_the_count_of_draws_is_real(monkeypatch):
    path = interval(tol=2.0**-20, shape=(5,))  # a shape of its own, so that it is traced here
    normal, calls = threefry.normal, []

    def counting(key, shape, dtype):
        jax.debug.callback(lambda: calls.append(1))
        return normal(key, shape, dtype)

    monkeypatch.setattr(threefry, "normal", counting)
    times, state = np.array([0.0, 0.01, 0.025, 0.026, 0.5, 0.49]), path.init()
    for s, t in zip(times[:-1], times[1:], strict=True):
        _, state = path.draw(s, t, state)
    jax.effects_barrier()
    assert len(calls) == int(state.draws)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("span", [(0.0, 1.0), (0.0, 63.0), (5.0, 5.7)])
def test_rounded_ends_are_nodes_and_lose_little(dtype, span):
    path = BrownianInterval(*span, (), KEY, tol=(span[1] - span[0]) * 2.0**-18)
    rng = np.random.default_rng(0)
    for bits in (2, 3, 4):
        for _ in range(20):
            a, b = (jnp.asarray(x, dtype) for x in sorted(rng.uniform(*span, 2)))
            end = path.round_down(a, b, bits=bits)
            assert end.dtype == dtype and a < end <= b
            assert (b - end) <= 2.0**-bits * (b - a) + 2.0**-17 * (span[1] - span[0])
            # Asked again, it is there already: the end survives floating point as a node.
            assert path.round_down(a, end, bits=18) == end
            back = path.round_down(b, a, bits=bits)
            assert a <= back < b and (back - a) <= 2.0**-bits * (b - a) + 2.0**-17 * (
                span[1] - span[0]
            )
    ends = [path.round_down(jnp.asarray(span[0], dtype), jnp.asarray(span[1], dtype)),
            path.round_down(jnp.asarray(span[1], dtype), jnp.asarray(span[0], dtype))]  # fmt: skip
    assert ends == [jnp.asarray(span[1], dtype), jnp.asarray(span[0], dtype)]


def test_float32_areas_do_not_suffer_from_the_distance_to_the_start():
    # Subtracting cumulative areas would cost a relative error of 6% at T/h = 1e4.
    tol = 2.0**-16
    single = BrownianInterval(0.0, 1.0, jax.ShapeDtypeStruct((64,), jnp.float32), KEY,
                              levy_area=diffrax.SpaceTimeLevyArea, tol=tol)  # fmt: skip
    s, h = 1 - 2.0**-12, 2.0**-14
    whole = single.evaluate(s, s + 2 * h, use_levy=True)
    first, second = (
        single.evaluate(s, s + h, use_levy=True),
        single.evaluate(s + h, s + 2 * h, use_levy=True),
    )
    joined = (first.H - second.W / 2 + second.H + first.W / 2) / 2
    assert float(jnp.max(jnp.abs(joined - whole.H))) < 1e-6 * np.sqrt(2 * h / 12)


def test_ends_within_4_ulp_are_clamped_and_farther_ones_are_errors():
    path = interval(t0=1.0, t1=3.0)
    ulp = np.spacing(3.0)
    np.testing.assert_array_equal(path.evaluate(2.0, 3.0 + 4 * ulp), path.evaluate(2.0, 3.0))
    np.testing.assert_array_equal(path.evaluate(1.0 - 4 * ulp, 2.0), path.evaluate(1.0, 2.0))
    for s, t, bad in [
        (2.0, 3.0 + 5 * ulp, 3.0 + 5 * ulp),
        (1.0 - 5 * ulp, 2.0, 1.0 - 5 * ulp),
        (2.0, 3.5, 3.5),
    ]:
        with pytest.raises(ValueError, match=rf"{bad}.*\[1.0, 3.0\]"):
            path.evaluate(s, t)
        with pytest.raises(RuntimeError, match=r"outside its interval .* \[1.0, 3.0\]"):
            jax.block_until_ready(evaluate(path, jnp.asarray(s), jnp.asarray(t)))
        increment, _ = advance(path, jnp.asarray(s), jnp.asarray(t), path.init())
        assert bool(jnp.all(jnp.isnan(increment.W)))
    assert bool(jnp.all(jnp.isnan(advance(path, jnp.nan, jnp.asarray(2.0), path.init())[0].W)))


def test_two_ends_inside_one_leaf_are_an_error():
    path = interval(tol=2.0**-4)
    with pytest.raises(
        ValueError, match=r"step 0.0[0-9]+ is below the resolution of the path, its `tol`=0.0625"
    ):
        path.evaluate(0.51, 0.53)
    with pytest.raises(RuntimeError, match="`tol`=0.0625"):
        jax.block_until_ready(evaluate(path, jnp.asarray(0.51), jnp.asarray(0.53)))
    assert bool(
        jnp.all(jnp.isnan(advance(path, jnp.asarray(0.51), jnp.asarray(0.53), path.init())[0].W))
    )


@pytest.mark.parametrize("bad, match", [
    (dict(t0=1.0, t1=1.0), r"\[1.0, 1.0\] is empty"),
    (dict(t0=2.0, t1=1.0), r"\[2.0, 1.0\] is empty"),
    (dict(tol=0.0), "`tol` of BrownianInterval is 0.0"),
    (dict(tol=1e-12), "`tol` of BrownianInterval is 1e-12"),
    (dict(key=0), r"`key` of BrownianInterval is 0; .* jax.random.key\(0\)"),
    (dict(key=jax.random.split(KEY, 2)), "shape \\(2,\\)"),
    (dict(levy_area=diffrax.SpaceTimeTimeLevyArea), "it makes only"),
])  # fmt: skip
def test_bad_paths_are_errors(bad, match):
    with pytest.raises(ValueError, match=match):
        interval(**bad)


def test_traced_intervals_give_the_same_bits():
    def query(t0, t1, tol):
        return BrownianInterval(t0, t1, (2,), KEY, tol=tol).evaluate(0.2, 0.7)

    expected = interval(tol=2.0**-10).evaluate(0.2, 0.7)
    np.testing.assert_array_equal(jax.jit(query)(0.0, 1.0, 2.0**-10), expected)


def test_a_key_that_is_a_constant_of_the_program_gives_the_same_bits():
    path = interval(diffrax.SpaceTimeLevyArea, shape=(50,))
    fixed = jax.jit(lambda s, t: path.evaluate(s, t, use_levy=True))
    for s, t in random_queries(6, 3):
        np.testing.assert_array_equal(numbers(fixed(s, t)), numbers(evaluate(path, s, t)))


def test_pytrees_have_the_shapes_and_types_of_diffrax():
    leaves = jax.ShapeDtypeStruct((2, 3), jnp.float64), jax.ShapeDtypeStruct((), jnp.float16)
    shape = {"a": leaves[0], "b": leaves[1]}
    for levy_area in LEVY_AREAS:
        ours = BrownianInterval(0.0, 1.0, shape, KEY, levy_area=levy_area)
        theirs = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, shape, KEY, levy_area=levy_area)
        for use_levy in (False, True):
            x, y = (
                jax.eval_shape(lambda p=p, u=use_levy: p.evaluate(0.25, 0.75, use_levy=u))
                for p in (ours, theirs)
            )
            assert jax.tree.structure(x) == jax.tree.structure(y)
            assert jax.tree.leaves(x) == jax.tree.leaves(y)
    values = ours.evaluate(0.25, 0.75)
    flat = BrownianInterval(0.0, 1.0, (7,), KEY, levy_area=levy_area).evaluate(0.25, 0.75)
    np.testing.assert_array_equal(values["a"].ravel(), flat[:6])
    np.testing.assert_array_equal(values["b"], flat[6].astype(jnp.float16))


ADJOINTS = [
    diffrax.RecursiveCheckpointAdjoint(),
    pytest.param(diffrax.BacksolveAdjoint(), marks=pytest.mark.slow),
    pytest.param(diffrax.DirectAdjoint(), marks=pytest.mark.slow),
    pytest.param(diffrax.ForwardMode(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("backwards", sweep([False, True], False))
def test_adaptive_solves_differentiate_with_every_adjoint(adjoint, backwards):
    t0, t1 = (1.0, 0.0) if backwards else (0.0, 1.0)
    path = interval(shape=(), tol=2.0**-20)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmin=2.0**-18)

    def solve(scale):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, scale: -y),
            diffrax.ControlTerm(lambda t, y, scale: scale * y, path),
        )
        return diffrax.diffeqsolve(
            terms, diffrax.Heun(), t0, t1, (t1 - t0) / 64, jnp.array(1.0), args=scale, adjoint=adjoint,
            stepsize_controller=controller, max_steps=4096,
        ).ys[-1]  # fmt: skip

    scale = jnp.array(0.3)
    grad = jax.jacfwd(solve) if isinstance(adjoint, diffrax.ForwardMode) else jax.grad(solve)
    w = path.evaluate(t0, t1)
    exact = w * jnp.exp(-(t1 - t0) + scale * w)
    np.testing.assert_allclose(grad(scale), exact, rtol=5e-2)


def test_a_gradient_with_respect_to_time_is_refused():
    with pytest.raises(ValueError, match="no gradient with respect to the times"):
        jax.grad(lambda t: jnp.sum(interval().evaluate(0.0, t)))(0.5)

"""The tape against a Python list of everything that was written to it."""

import diffrax as dfx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nde.solvers import EES25, DiscreteAdjoint, ReversibleAdjoint
from nde.solvers.adjoint import tape as tapes

LONGEST = 1200


def strides(slots):
    count = jnp.arange(LONGEST + 1, dtype=jnp.int32)
    return 1 << np.asarray(tapes.doublings(count, slots))


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("slots", [2, 8, 64])
def test_every_row_that_should_be_there_is_there(slots, unit):
    """Writes the rows 0, 1, 2, ... into a list, and looks after each one."""
    stride, steps = strides(slots), jnp.arange(LONGEST * unit, dtype=jnp.int32)
    row = np.asarray(tapes.Doubling(slots, unit).row(steps))
    slot = np.asarray(tapes.slot(steps, slots))
    held = [-1] * (slots + 1)
    for k in range(LONGEST):
        for step in range(k * unit, (k + 1) * unit):
            held[row[step]] = step
        count = k + 1
        wanted = range(0, count, stride[count])
        assert [held[slot[j]] for j in wanted] == [unit * j for j in wanted]
        assert len(wanted) <= slots
    assert unit > 1 or -1 not in held  # no row is wasted, the one for what is not kept included


@pytest.mark.parametrize("slots", [2, 8, 64])
def test_stride_is_the_least_power_of_two_that_fits(slots):
    for count, stride in enumerate(strides(slots)):
        assert slots * stride >= count
        assert stride == 1 or slots * stride // 2 < count


@hypothesis.given(st.integers(1, 300), st.integers(1, 2**30), st.integers(1, 100))
def test_plan_has_room_for_every_solve(checkpoints, max_steps, unit):
    unit = min(unit, max_steps)
    (slots, _), (rows, q) = tapes.keeping(checkpoints, max_steps, unit)
    units = -(-max_steps // unit)
    assert slots.bit_count() == 1 and min(checkpoints, units) <= slots < 2 * max(2, checkpoints)
    stretch = unit << int(tapes.doublings(jnp.int32(units), slots))
    assert stretch <= 2**q and (q == 0 or rows >= q)
    assert rows < max(2 * unit, slots, 32)  # and not the longer for a larger `max_steps`


@pytest.mark.parametrize("rows, q", [(1, 1), (7, 3), (7, 4), (3, 3), (5, 5), (31, 9), (31, 10)])
@pytest.mark.parametrize("length", [1.0, 0.7])
def test_a_ladder_finds_every_step_of_a_stretch(rows, q, length):
    """Goes back through a stretch as the backward loop does, and counts what is replayed."""
    ladder, count = tapes.Ladder(rows, q), max(1, int(length * 2**q))
    steps = jnp.arange(2**q, dtype=jnp.int32)
    place = np.asarray(ladder.place(steps, jnp.int32(q)))
    origin = np.asarray(ladder.origin(steps, steps == count - 1, jnp.int32(q)))
    held, replayed = {0: 0}, 0
    for j in range(count - 1, -1, -1):
        assert held[place[origin[j]]] == origin[j]
        for k in range(origin[j] + 1, j + 1):
            held[place[k]], replayed = k, replayed + 1
        assert held[place[j]] == j
    assert max(held) <= rows
    levels = min(n for n in range(1, q + 1) if n * (2 ** -(-q // n) - 1) <= rows)
    assert replayed < levels * count


def test_rows_common_to_all_lanes_and_rows_of_their_own():
    rows = {
        "a": jnp.arange(15.0).reshape(5, 3),
        "b": jnp.arange(30, dtype=jnp.int32).reshape(5, 3, 2),
    }
    value = {"a": jnp.array([-1.0, -2.0, -3.0]), "b": -jnp.ones((3, 2), jnp.int32)}
    for index in (np.int32(3), np.array([4, 0, 2], np.int32)):
        got = jax.jit(tapes.put)(rows, index, value)
        for name in rows:
            want = np.array(rows[name])
            want[index, np.arange(3)] = value[name]
            np.testing.assert_array_equal(got[name], want)
            read = jax.jit(tapes.get)(got, index)[name]
            np.testing.assert_array_equal(read, value[name])


def test_a_row_beyond_the_last_is_dropped():
    rows = jnp.arange(6.0).reshape(3, 2)
    got = tapes.put(rows, np.array([3, 1], np.int32), jnp.array([-1.0, -2.0]))
    np.testing.assert_array_equal(got, [[0.0, 1.0], [2.0, -2.0], [4.0, 5.0]])


def test_put_keeps_the_dtype_of_the_rows():
    got = tapes.put(jnp.zeros((2, 1), jnp.float32), np.int32(0), jnp.ones(1, jnp.float64))
    np.testing.assert_array_equal(got, np.array([[1.0], [0.0]], np.float32), strict=True)


def test_packing_keeps_values_dtypes_and_order():
    row = tapes.Row(
        {"a": jnp.ones((3, 2)), "b": jnp.arange(3.0)}, (), jnp.arange(3.0) + 5, jnp.zeros(3),
        jnp.array([True, False, True]), None, (jnp.arange(3), jnp.ones(3, jnp.float32)),
    )  # fmt: skip
    packed = tapes.pack(row)
    assert len(packed.states) == 2  # a matrix, and one array for the numbers
    assert len(packed.times) == 4  # one array for each dtype
    same = lambda a, b: np.testing.assert_array_equal(a, b, strict=True)
    jax.tree.map(same, tapes.unpack(packed, row), row)


SLOTS, ATTEMPTS, LANES = 4, 30, 3
PLAN = tapes.Plan(tapes.Doubling(SLOTS), knots=tapes.Doubling(2 * SLOTS))
OFFSETS = np.array([0.0, 100.0, 200.0])


def row_at(k, t):
    return tapes.Row(OFFSETS + t, (), t + 0.25, t + 1.0, k % 3 == 1, t)


START = row_at(jnp.zeros(LANES, jnp.int32), jnp.zeros(LANES))


@jax.jit
def recorded(accept):
    """Attempt i of a lane that has accepted k steps: state 100 lane + k, from k + 1/4 to k + 1."""

    def attempt(i, carry):
        tape, k = carry
        tape = tapes.record(PLAN, tape, k, accept[i], row_at(k, k.astype(jnp.float64)))
        return tape, k + accept[i].astype(jnp.int32)

    begin = (tapes.empty(PLAN, START), jnp.zeros(LANES, jnp.int32))
    return jax.lax.fori_loop(0, ATTEMPTS, attempt, begin)


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.lists(st.floats(0, 1), min_size=LANES, max_size=LANES)
)
def test_each_lane_keeps_its_own_accepted_steps(seed, rates):
    accept = np.random.default_rng(seed).random((ATTEMPTS, LANES)) < np.array(rates)
    tape, steps = recorded(accept)
    np.testing.assert_array_equal(steps, accept.sum(axis=0))
    # Read at the stride of the lane with most steps, as the backward loop does.
    for rows, like, slots in [
        (tape.rows, START, SLOTS),
        (tape.knots, tapes.ends(START), 2 * SLOTS),
    ]:
        for k in range(0, int(steps.max()), 1 << int(tapes.doublings(steps.max(), slots))):
            row = tapes.unpack(tapes.get(rows, tapes.slot(jnp.int32(k), slots)), like)
            want, mine = row_at(jnp.full(LANES, k), jnp.full(LANES, float(k))), k < steps
            for got, value in zip(row, want, strict=True):
                if got is not None and not isinstance(got, tuple):
                    np.testing.assert_array_equal(got[mine], value[mine])


@pytest.mark.parametrize("solver", [dfx.Tsit5(), EES25()], ids=lambda s: type(s).__name__)
def test_the_way_back_reads_a_step_of_all_lanes_at_once(solver):
    """Element by element, from times that are long, XLA reads in parallel: dearer than a small step."""
    adjoint = DiscreteAdjoint() if isinstance(solver, dfx.Tsit5) else ReversibleAdjoint()
    rows = {dfx.Tsit5: 256 + 1 + 31, EES25: 1025}[type(solver)]  # states and ladder; ends of steps

    def loss(rate, y0):
        controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
        solve = lambda y0: dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -rate * y), solver, 0.0, 1.0, 0.1, y0,
            stepsize_controller=controller, adjoint=adjoint, max_steps=1000,
        )  # fmt: skip
        return jnp.sum(jax.vmap(solve)(y0).ys)

    text = jax.jit(jax.grad(loss)).lower(1.0, jnp.arange(1.0, 4.0)).as_text()
    reads = [line for line in text.splitlines() if f"(tensor<{rows}x3x" in line]
    by_element = [line for line in reads if "stablehlo.gather" in line]
    by_row = [line for line in reads if "stablehlo.dynamic_slice" in line]
    assert by_row and not by_element

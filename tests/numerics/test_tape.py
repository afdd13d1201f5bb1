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
    return np.asarray(tapes.stride(jnp.arange(LONGEST + 1, dtype=jnp.int32), slots))


@pytest.mark.parametrize("slots", [2, 4, 8, 16, 32, 64])
def test_every_state_that_should_be_there_is_there(slots):
    """Writes the states 0, 1, 2, ... into a list of rows, and looks after each one."""
    stride, states = strides(slots), jnp.arange(LONGEST, dtype=jnp.int32)
    row = np.asarray(tapes.Doubling(slots).row(states))
    slot = np.asarray(tapes.slot(states, slots))
    held = [-1] * (slots + 1)
    for k in range(LONGEST):
        held[row[k]] = k
        count = k + 1
        wanted = range(0, count, stride[count])
        assert [held[slot[j]] for j in wanted] == list(wanted)
        assert len(wanted) <= slots
    assert -1 not in held  # no row is wasted, the one for what is not kept included


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_every_kth_state_is_kept(steps):
    keep = tapes.Every(5, steps)
    rows = [int(keep.row(jnp.int32(k))) for k in range(5 * steps)]
    assert rows == [k // steps if k % steps == 0 else 5 for k in range(5 * steps)]


@pytest.mark.parametrize("slots", [2, 8, 64])
def test_stride_is_the_least_power_of_two_that_fits(slots):
    for count, stride in enumerate(strides(slots)):
        assert stride.bit_count() == 1
        assert slots * stride >= count
        assert stride == 1 or slots * stride // 2 < count


@hypothesis.given(st.integers(1, 300), st.integers(1, 100_000))
def test_plan_has_room_for_every_solve(checkpoints, max_steps):
    slots, spare = tapes.doubling(checkpoints, max_steps)
    longest = spare + 1
    assert slots.bit_count() == longest.bit_count() == 1
    assert slots >= max(2, min(checkpoints, max_steps))
    assert int(tapes.stride(jnp.int32(max_steps), slots)) <= longest
    fewest = max(2, min(checkpoints, max_steps), int(np.ceil(np.sqrt(max_steps))))
    assert slots < 2 * fewest and longest < 2 * fewest


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


SLOTS, ATTEMPTS, LANES = 4, 30, 3
KEEP = tapes.Doubling(SLOTS)
OFFSETS = np.array([0.0, 100.0, 200.0])


@jax.jit
def recorded(accept):
    """Attempt i of a lane that has accepted k steps: state 100 lane + k, from k + 1/4 to k + 1."""
    t0 = jnp.full(LANES, 0.25)
    tape = tapes.empty(KEEP, jnp.asarray(OFFSETS), t0, jnp.zeros(LANES, bool), ATTEMPTS)

    def attempt(i, carry):
        tape, k = carry
        t = k.astype(jnp.float64)
        tape = tapes.record(KEEP, tape, k, accept[i], OFFSETS + t, t + 0.25, t + 1.0, k % 3 == 1)
        return tape, k + accept[i].astype(jnp.int32)

    return jax.lax.fori_loop(0, ATTEMPTS, attempt, (tape, jnp.zeros(LANES, jnp.int32)))


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.lists(st.floats(0, 1), min_size=LANES, max_size=LANES)
)
def test_each_lane_keeps_its_own_accepted_steps(seed, rates):
    accept = np.random.default_rng(seed).random((ATTEMPTS, LANES)) < np.array(rates)
    tape, steps = recorded(accept)
    np.testing.assert_array_equal(steps, accept.sum(axis=0))
    for k in range(int(steps.max())):
        t0, t1, jump = tapes.times(tape, jnp.full(LANES, k, jnp.int32))
        mine = k < steps
        np.testing.assert_array_equal(t0[mine], k + 0.25)
        np.testing.assert_array_equal(t1[mine], k + 1.0)
        np.testing.assert_array_equal(jump[mine], k % 3 == 1)
    # Read at the stride of the lane with most steps, as the backward loop does.
    for k in range(0, int(steps.max()), int(tapes.stride(steps.max(), SLOTS))):
        state = tapes.get(tape.states, tapes.slot(jnp.int32(k), SLOTS))
        np.testing.assert_array_equal(state[k < steps], (OFFSETS + k)[k < steps])


def test_lanes_in_lockstep_share_their_rows():
    """One index for all: a lane that has ended writes steps of length zero behind its last."""
    ends = np.array([2, 5, 4])
    t0 = jnp.zeros(LANES)
    tape = tapes.empty(KEEP, jnp.arange(3.0), t0, None, 8)
    t = np.zeros(LANES)
    for k in range(5):
        accept = k < ends
        tape = tapes.record(
            KEEP,
            tape,
            jnp.int32(k),
            accept,
            jnp.arange(3.0) + 10 * k,
            t,
            t + 1.0,
            jnp.zeros(3, bool),
        )
        t = t + accept
    for k in range(5):
        start, end, jump = tapes.times(tape, jnp.int32(k))
        np.testing.assert_array_equal(start, np.minimum(k, ends))
        np.testing.assert_array_equal(end, np.minimum(k + 1, ends))
        assert not jump.any()
    for k in (0, 2, 4):
        state = tapes.get(tape.states, tapes.slot(jnp.int32(k), SLOTS))
        np.testing.assert_array_equal(state, np.arange(3.0) + 10 * k)


@pytest.mark.parametrize("solver", [dfx.Tsit5(), EES25()], ids=lambda s: type(s).__name__)
def test_the_way_back_reads_a_step_of_all_lanes_at_once(solver):
    """Element by element, from times that are long, XLA reads in parallel: dearer than a small step."""
    adjoint = DiscreteAdjoint() if isinstance(solver, dfx.Tsit5) else ReversibleAdjoint()
    rows = 1002  # max_steps, and two

    def loss(rate, y0):
        controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
        solve = lambda y0: dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -rate * y), solver, 0.0, 1.0, 0.1, y0,
            stepsize_controller=controller, adjoint=adjoint, max_steps=1000,
        )  # fmt: skip
        return jnp.sum(jax.vmap(solve)(y0).ys)

    text = jax.jit(jax.grad(loss)).lower(1.0, jnp.arange(1.0, 4.0)).as_text()
    reads = [line for line in text.splitlines() if f"(tensor<{rows}x3xf64>" in line]
    by_element = [line for line in reads if "stablehlo.gather" in line]
    by_row = [line for line in reads if "stablehlo.dynamic_slice" in line]
    # Where the reversal of a lane ends is looked up once, before the loop.
    assert len(by_element) <= 2 * isinstance(solver, EES25) and by_row

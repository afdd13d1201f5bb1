r"""The backward loop: replay a chunk of steps from its stored state, then pull back step by step.

With stride m between stored states and n accepted steps, chunk c holds the steps c m .. c m + m - 1:

    for c = last .. 0:
        y = stored state c m;  replay the chunk, keeping every state          (at most 1 F per step)
        for k = last of the chunk .. first:
            add the cotangents of what was saved at or inside step k
            (ct_y, ct_consts) += transposed derivative of step k              (1 F + 1 B per step)

A lane with fewer steps waits until its own last step comes by. While it waits it evaluates its first
step, with cotangent zero. (Not just any state with any step: zero times what overflows is nan.) A lane
that failed waits all the time, at the first step of its donor (`donors`): no step is its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.tape import Doubling, Trail
from nde.solvers.adjoint.traced import LaneFunctions, Save
from nde.solvers.estimates.estimates import Judged
from nde.solvers.lanes.batch import masked
from nde.solvers.lanes.closures import ClosedFunction
from nde.solvers.lanes.donors import donors

TapeRow = Callable[[Array], Array]  # from a step to where its state stands


class Cotangents(NamedTuple):
    """Of the results of a solve, in all lanes; zeros where nothing depends on one."""

    y: PyTree[Array]
    state: PyTree[Array]  # the inexact leaves
    saved_ys: tuple[PyTree[Array] | None, ...]  # None where nothing depends on any row
    judged: Judged | None  # likewise, and so are its entries


class RecordedStep(NamedTuple):
    """One step of every lane, ready to be evaluated."""

    y: PyTree[Array]
    inner: PyTree[Array]
    t0: Array
    t1: Array
    made_jump: Array


class BackwardCarry(NamedTuple):
    """The cotangents before the present step, going backwards."""

    y: PyTree[Array]
    inner: PyTree[Array]
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]  # of the noise


def run_backward(
    functions: LaneFunctions,
    ts: tuple[Array, ...],
    trail: Trail,
    cotangents: Cotangents,
    wanted: dict[int, Array],
    plan: Doubling,
) -> BackwardCarry:
    """Pulls cotangents back to the initial value and to the constants in `wanted` (zeros to add to).

    `plan`: which states the forward loop has kept.
    """
    pullback = StepPullback(functions, ts, trail, cotangents, wanted)
    ct = pullback.final(cotangents)
    if not functions.traced.hands_over:
        return _to_start(pullback, trail, plan, ct)
    # Nothing depends on the last cache.
    cache = trees.zeros_like(pullback.first.inner[1])
    ct = _to_start(pullback, trail, plan, ct._replace(inner=(ct.inner, cache)))
    # Where no lane took a step there is none to copy, and the field may be undefined.
    none = lambda: ct._replace(inner=ct.inner[0])
    return jax.lax.cond(jnp.any(trail.steps > 0), lambda: pullback.first_cache(ct), none)


def _to_start(pullback, trail: Trail, plan: Doubling, ct: BackwardCarry) -> BackwardCarry:
    """Pulls back to the first step."""
    most, states = jnp.max(trail.steps), trail.tape.states
    zero = jnp.zeros_like(most)
    stored = lambda k: tapes.slot(k, plan.rows)
    if not plan.spare:  # every state is there
        return steps_back(pullback, zero, most, states, stored, ct)[0]
    last = tapes.stride(most, plan.rows) - 1  # of a chunk; a mask, as the stride is a power of two

    def tape_row(k: Array) -> Array:
        place = k & last
        return jnp.where(place == 0, stored(k), plan.rows + place)

    def replay_from(k: Array) -> Array:
        place = k & last
        return jnp.where((place == last) | (k == most - 1), k - place, k)

    return steps_back(pullback, zero, most, states, tape_row, ct, replay_from)[0]


def replay(
    pullback: "StepPullback",
    k0: Array,
    k1: Array,
    states: PyTree[Array],
    tape_row: TapeRow,
    memory: PyTree[Array],
) -> tuple[RecordedStep, PyTree[Array], PyTree[Array]]:
    """From the state at step k0 to step k1, writing down every state on the way.

    A step is loaded ahead and handed on by the loop: so it is read once, and not by each of its stages.
    """

    def one_step(k: Any, carry: Any):
        loaded, states, memory = carry
        k = jnp.asarray(k, jnp.int32)  # a number under `jax.disable_jit`
        after, memory = pullback.advance(loaded, memory)
        after = trees.where(k + 1 < pullback.steps, after, (loaded.y, loaded.inner))
        states = tapes.put(states, tape_row(k + 1), after)
        return pullback.load(k + 1, after), states, memory

    carry = (pullback.load(k0, tapes.get(states, tape_row(k0))), states, memory)
    return jax.lax.fori_loop(k0, k1, one_step, carry)


def steps_back(
    pullback: "StepPullback",
    k0: Array,
    count: Array,
    states: PyTree[Array],
    tape_row: TapeRow,
    ct: BackwardCarry,
    replay_from: Callable[[Array], Array] | None = None,
) -> tuple[BackwardCarry, PyTree[Array]]:
    """Pulls back through `count` steps from step k0 on; returns the rows as well.

    `tape_row(k)`: the row of `states` for the state before step k. `replay_from(k)`: the step whose
    state is there, to replay from before step k can be pulled back; None: every state is there.
    """

    def one_step(i: Array, carry: tuple[BackwardCarry, PyTree[Array]]):
        ct, states = carry
        k = k0 + count - 1 - i
        if replay_from is None:
            loaded = pullback.load(k, tapes.get(states, tape_row(k)))
        else:
            replayed = replay(pullback, replay_from(k), k, states, tape_row, ct.memory)
            loaded, states, memory = replayed
            ct = ct._replace(memory=memory)
        return pullback.step(k, loaded, ct), states

    return jax.lax.fori_loop(0, count, one_step, (ct, states))


def replayed_chunk(
    pullback: "StepPullback",
    k0: Array,
    length: Array,
    state: PyTree[Array],
    ct: BackwardCarry,
    states: PyTree[Array],
) -> tuple[BackwardCarry, PyTree[Array]]:
    """Replays `length` steps from the state at step k0, then pulls back through them.

    `states`: rows for at least `length` states, to be overwritten.
    """
    states = tapes.put(states, jnp.zeros_like(k0), state)
    replay_from = lambda k: jnp.where(k == k0 + length - 1, k0, k)
    return steps_back(pullback, k0, length, states, lambda k: k - k0, ct, replay_from)


class StepPullback:
    """One step of the backward pass. Holds what does not change from step to step."""

    def __init__(
        self,
        functions: LaneFunctions,
        ts: tuple[Array, ...],
        trail: Trail,
        cotangents: Cotangents,
        wanted: dict[int, Array],
    ):
        self.traced, self.lanes = functions.traced, functions.lanes
        self.tape, self.steps = trail.tape, trail.steps
        self.ts, self.ts_index = ts, trail.ts_index
        self.saved, self.judged = cotangents.saved_ys, cotangents.judged
        self.wanted = wanted
        self.donors = donors(trail.steps, self.lanes, functions.consts)
        self.consts = self.donors.copied_consts(functions.consts, self.lanes)
        self.functions = functions._replace(consts=self.consts)
        start = jnp.zeros((), jnp.int32)
        self.memory = self.functions.memory(tapes.get(trail.tape.knots, start))
        y, inner = tapes.get(trail.tape.states, start) or (None, None)
        first = RecordedStep(y, inner, *tapes.times(trail.tape, start))
        self.first = cast(RecordedStep, self.donors.copied(first))

    def final(self, cotangents: Cotangents) -> BackwardCarry:
        """What the backward loop begins with: nothing in lanes that failed."""
        y, state = masked(self.steps >= 0, (cotangents.y, cotangents.state))
        return BackwardCarry(y, state, self.wanted, self.ts_index, self.memory)

    def load(self, k: Array, state: PyTree[Array]) -> RecordedStep:
        """Step k from `state` in every lane that has one, else a harmless one."""
        y, inner = state
        loaded = RecordedStep(y, inner, *tapes.times(self.tape, k))
        return cast(RecordedStep, trees.where(k < self.steps, loaded, self.first))

    def advance(
        self, loaded: RecordedStep, memory: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The state behind a step, and the memory of the noise."""
        increments, memory = self.functions.draw(loaded.t0, loaded.t1, memory)
        return self.functions(self.traced.advance, *loaded, increments)[:2], memory

    def step(self, k: Array, loaded: RecordedStep, ct: BackwardCarry) -> BackwardCarry:
        """From the cotangents behind step k to those before it."""
        active = k < self.steps
        y, inner, t0, t1, jump = loaded
        moving, fixed = eqx.partition(inner, eqx.is_inexact_array)
        increments, memory = self.functions.draw(t0, t1, ct.memory)
        ct = ct._replace(memory=memory)
        ct, ct_dense = self._outputs(k, active, loaded, increments, ct)

        def advance(consts: list[Array], x: Array, aux: PyTree[Array]):
            (y, moving), (fixed, *rest) = x, aux
            out = self.traced.advance(consts, y, eqx.combine(moving, fixed), *rest)
            y1, inner, dense, judged = out
            return y1, _inexact(inner), dense, _asked(judged, self.judged)

        behind = masked(active, (ct.y, ct.inner))
        aux = (fixed, t0, t1, jump, increments)
        ct_judged = None if self.judged is None else masked(active, tapes.get(self.judged, k))
        ct_out = (*behind, ct_dense, ct_judged)
        uses = self.traced.advance.uses
        _, ct_consts, ct_x = self.transpose(advance, uses, (y, moving), aux, ct_out)
        y, inner = trees.where(active, ct_x, (ct.y, ct.inner))
        return ct._replace(y=y, inner=inner, consts=added(ct.consts, ct_consts))

    def first_cache(self, ct: BackwardCarry) -> BackwardCarry:
        """From the cotangents of the first cache to those of what it was evaluated from."""
        (state, _), (ct_state, ct_cache) = self.first.inner, ct.inner
        evaluate = lambda consts, y, aux: self.traced.cache(consts, aux[0], y, aux[1])
        aux, succeeded = (self.first.t0, state), self.steps >= 0
        _, ct_consts, ct_y = self.transpose(
            evaluate, self.traced.cache.uses, self.first.y, aux, masked(succeeded, ct_cache)
        )
        y = trees.add(ct.y, masked(succeeded, ct_y))
        return ct._replace(y=y, inner=ct_state, consts=added(ct.consts, ct_consts))

    def transpose(
        self,
        fn: Callable[..., PyTree],
        uses: tuple[int, ...],
        x: PyTree,
        aux: PyTree,
        ct_out: PyTree,
        consts: list[Array] | None = None,
    ) -> tuple[PyTree, dict[int, Array], PyTree]:
        """The value, and the cotangents of the wanted constants (by number) and of `x`."""
        consts = self.consts if consts is None else consts
        numbers = [i for i in range(len(consts)) if i in self.wanted and i in uses]
        wrt = [i in numbers for i in range(len(consts))]
        pull = self.lanes.pull(fn, wrt)
        value, ct_consts, ct_x = pull(consts, x, aux, ct_out)
        return value, dict(zip(numbers, ct_consts, strict=True)), ct_x

    def _output(self, fn, save: Save, uses, due: Array, x, aux, ct_out):
        """The cotangents of an output that is due in some lanes: of the constants, and of `x`.

        It may have no derivative where it is not saved: there a lane copies the inputs of one that is
        due, the constants included, as they belong to the point.
        """
        consts = self.consts
        if not save.plain:
            who = donors(due.astype(jnp.int32), self.lanes, consts)
            consts = who.copied_consts(consts, self.lanes)
            x, aux = who.copied((x, aux))
        _, ct_consts, ct_x = self.transpose(fn, uses, x, aux, masked(due, ct_out), consts)
        return ct_consts, masked(due, ct_x)

    def filled(self, ct_consts: dict[int, Array]) -> dict[int, Array]:
        """With zeros for the wanted constants that are missing."""
        return {i: ct_consts.get(i, jnp.zeros_like(x)) for i, x in self.wanted.items()}

    def _outputs(self, k, active, loaded: RecordedStep, increments, ct: BackwardCarry):
        """Adds the cotangents of what was saved in step k, and returns those of its dense output."""
        if all(save.at_time is None and save.at_step is None for save in self.traced.saves):
            return ct, None
        _, _, t0, t1, _ = loaded
        y1, _, dense, _ = self.functions(self.traced.advance, *loaded, increments)
        ct_dense = trees.zeros_like(dense)
        before = jnp.where(k == 0, -jnp.inf, tapes.get(self.tape.knots, k))
        for j, save in enumerate(self.traced.saves):
            if self.saved[j] is None:
                continue
            if save.at_step is not None:
                ct = self.at_step(j, save, save.at_step, k, active, t1, y1, ct)
            if save.at_time is not None and save.times:
                ct, ct_dense = self._at_times(
                    j, save, save.at_time, k, active, before, t0, t1, dense, ct, ct_dense
                )
        return ct, ct_dense

    def at_step(
        self,
        j: int,
        save: Save,
        fn: ClosedFunction,
        k: Array,
        active: Array,
        t1: Array,
        y1: PyTree[Array],
        ct: BackwardCarry,
    ) -> BackwardCarry:
        """Adds the cotangents of the j-th kind of output, where the end of step k was saved."""
        due = active & ((k + 1) % save.every == 0)
        row = jnp.where(due, save.output_row(ct.ts_index[j], k + 1) - 1, 0)
        ct_out = tapes.get(self.saved[j], row)
        at_step = lambda consts, y, t: _inexact(fn(consts, t, y))

        def pulled() -> BackwardCarry:
            ct_consts, ct_y = self._output(at_step, save, fn.uses, due, y1, t1, ct_out)
            y = trees.add(ct.y, ct_y)
            return ct._replace(y=y, consts=added(ct.consts, ct_consts))

        return pulled() if save.plain else jax.lax.cond(jnp.any(due), pulled, lambda: ct)

    def _at_times(
        self, j, save: Save, fn: ClosedFunction, k, active, before, t0, t1, dense, ct, ct_dense
    ) -> tuple[BackwardCarry, PyTree[Array]]:
        """Adds the cotangents of the j-th kind of output, at the save times inside step k."""

        def at_time(consts: list[Array], dense: bool, aux: PyTree[Array]):
            t0, t1, t = aux
            return _inexact(fn(consts, t0, t1, dense, t))

        def last_time(index: Array):
            t = tapes.get(self.ts[j], jnp.maximum(index - 1, 0))
            return t, active & (index > 0) & (t > before)

        def cond(carry: Any):
            return jnp.any(last_time(carry[0])[1])

        def body(carry: tuple[Array, PyTree, dict[int, Array]]):
            index, ct_dense, ct_all = carry
            t, due = last_time(index)
            row = jnp.where(due, save.output_row(index - 1, jnp.broadcast_to(k, due.shape)), 0)
            ct_out, aux = tapes.get(self.saved[j], row), (t0, t1, jnp.where(due, t, t1))
            ct_consts, ct_here = self._output(at_time, save, fn.uses, due, dense, aux, ct_out)
            ct_dense = trees.add(ct_dense, ct_here)
            return index - due.astype(jnp.int32), ct_dense, added(ct_all, ct_consts)

        index, ct_dense, ct_consts = jax.lax.while_loop(
            cond, body, (ct.ts_index[j], ct_dense, ct.consts)
        )
        ts_index = tuple(index if i == j else n for i, n in enumerate(ct.ts_index))
        return ct._replace(consts=ct_consts, ts_index=ts_index), ct_dense


def _asked(judged: Judged | None, cts: Judged | None) -> Judged | None:
    """The estimates that have cotangents: the others cost nothing on the way back."""
    if judged is None or cts is None:
        return None
    kept: list[Any] = [None if ct is None else x for x, ct in zip(judged, cts, strict=True)]
    return Judged(*kept)


def _inexact(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_inexact_array)


def added(total: dict[int, Array], part: dict[int, Array]) -> dict[int, Array]:
    """The cotangents of constants, by number, with `part` added."""
    return {i: total[i] + part[i] if i in part else total[i] for i in total}

r"""The backward loop: replay a stretch of steps from a row that was kept, then pull back step by step.

With stride m between kept rows and n accepted steps, a stretch holds the steps c m .. c m + m - 1:

    for k = n - 1 .. 0:
        replay from the last row that is there to the start of step k         (see the ladder in `tape`)
        add the cotangents of what was saved at or inside step k
        (ct_y, ct_consts) += transposed derivative of step k                  (1 F + 1 B per step)

A replay goes on where the forward loop stood, controller included, so the times of steps need not be
kept. Where steps may be rejected, a step whose end is on the tape (`knots`) is not tried but taken; if
only every p-th end is, those between are found again by trying, and cannot go beyond it.

A lane with fewer steps waits until its own last step comes by. While it waits it evaluates its first
step, with cotangent zero. (Not just any state with any step: zero times what overflows is nan.) A lane
that failed waits all the time, at the first step of its donor (`donors`): no step is its own.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.forward import Standing, moved, refreshed, row_of, tried
from nde.solvers.adjoint.tape import Plan, Row, Rows, Trail
from nde.solvers.adjoint.traced import LaneFunctions, Save, Start, end_floor
from nde.solvers.estimates.estimates import Judged
from nde.solvers.lanes.batch import masked
from nde.solvers.lanes.closures import ClosedFunction
from nde.solvers.lanes.donors import donors


class Places(NamedTuple):
    """Where the rows of steps stand, and from which step on one is replayed."""

    row: Callable[[Array], Array]
    origin: Callable[[Array], Array] | None = None  # None: every row is there


class Cotangents(NamedTuple):
    """Of the results of a solve, in all lanes; zeros where nothing depends on one."""

    y: PyTree[Array]
    state: PyTree[Array]  # the inexact leaves
    saved_ys: tuple[PyTree[Array] | None, ...]  # None where nothing depends on any row
    judged: Judged | None  # likewise, and so are its entries


class BackwardCarry(NamedTuple):
    """The cotangents before the present step, going backwards."""

    y: PyTree[Array]
    inner: PyTree[Array]
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]  # of the noise
    clock: Rows | None = None  # the times of steps, where only they are kept


def places_of(most: Array, plan: Plan) -> Places:
    """Where rows stand behind `most` steps of which the slots hold some."""
    keep, ladder = plan.rows, plan.ladder
    assert keep is not None
    return _places(most, keep, ladder)


def kept_mask(most: Array, keep: tapes.Doubling) -> Array:
    """The bits of k that are zero where row k is kept, behind `most` steps."""
    return jnp.left_shift(1, tapes.doublings(most, keep.slots)) - 1


def clock_places(most: Array, plan: Plan) -> Places:
    """The same for the rows of the clock."""
    assert plan.clock is not None
    return _places(most, plan.clock, plan.ticks)


def _places(most: Array, keep: tapes.Doubling, ladder: tapes.Ladder) -> Places:
    """Where every step stands: those that are kept in their slots, the others on the ladder behind."""
    stored = lambda k: tapes.slot(k, keep.slots)
    if not ladder.most:
        return Places(stored)
    q, mask = tapes.doublings(most, keep.slots), kept_mask(most, keep)

    def row(k: Array) -> Array:
        j = k & mask
        return jnp.where(j == 0, stored(k), keep.slots + ladder.place(j, q))

    def origin(k: Array) -> Array:
        j = k & mask
        return k - j + ladder.origin(j, (j == mask) | (k == most - 1), q)

    return Places(row, origin)


def replay(
    pullback: "StepPullback", k0: Array, k1: Array, rows: Rows, places: Places, memory: PyTree
) -> tuple[Rows, PyTree[Array]]:
    """From the row of step k0 to that of step k1, writing down every row on the way."""

    def one_step(k: Any, carry: Any):
        at, rows, memory = carry
        k = jnp.asarray(k, jnp.int32)  # a number under `jax.disable_jit`
        at, behind, memory = pullback.advance(k, pullback.with_cache(at, k == k0), memory)
        if not pullback.traced.uniform:  # only now is it known where the step ends
            rows = tapes.put(rows, places.row(k), tapes.pack(pullback.row_of(at)))
        row = tapes.pack(pullback.row_of(behind))
        return behind, tapes.put(rows, places.row(k + 1), row), memory

    at = pullback.standing(pullback.load(k0, tapes.get(rows, places.row(k0))))
    stop = jnp.where(k0 < k1, k1 + pullback.must_try(k1), k1)
    return jax.lax.fori_loop(k0, stop, one_step, (at, rows, memory))[1:]


def steps_back(
    pullback: "StepPullback",
    k0: Array,
    count: Array,
    rows: Rows,
    places: Places,
    ct: BackwardCarry,
) -> tuple[BackwardCarry, Rows]:
    """Pulls back through `count` steps from step k0 on; returns the rows as well."""

    def one_step(i: Array, carry: tuple[BackwardCarry, Rows]):
        ct, rows = carry
        k = k0 + count - 1 - i
        if places.origin is not None:
            rows, memory = replay(pullback, places.origin(k), k, rows, places, ct.memory)
            ct = ct._replace(memory=memory)
        loaded = pullback.load(k, tapes.get(rows, places.row(k)))
        return pullback.step(k, loaded, ct), rows

    return jax.lax.fori_loop(0, count, one_step, (ct, rows))


def replayed_stretch(
    pullback: "StepPullback",
    k0: Array,
    length: Array,
    row: Row,
    ct: BackwardCarry,
    rows: Rows,
) -> tuple[BackwardCarry, Rows]:
    """Replays `length` steps from the row of step k0, then pulls back through them.

    `rows`: those of the ladder, to be overwritten, behind one for `row`.
    """
    ladder = pullback.plan.ladder
    rows = tapes.put(rows, jnp.zeros_like(k0), tapes.pack(row))
    q = 32 - jax.lax.clz(length - 1)
    last = lambda k: k == k0 + length - 1
    places = Places(
        lambda k: ladder.place(k - k0, q), lambda k: k0 + ladder.origin(k - k0, last(k), q)
    )
    return steps_back(pullback, k0, length, rows, places, ct)


class StepPullback:
    """One step of the backward pass. Holds what does not change from step to step."""

    def __init__(
        self,
        functions: LaneFunctions,
        start: Start,
        trail: Trail,
        cotangents: Cotangents,
        wanted: dict[int, Array],
        plan: Plan,
    ):
        self.traced, self.lanes = functions.traced, functions.lanes
        self.tape, self.steps, self.plan = trail.tape, trail.steps, plan
        self.ts, self.ts_index = start.ts, trail.ts_index
        self.saved, self.judged = cotangents.saved_ys, cotangents.judged
        self.wanted = wanted
        self.donors = donors(trail.steps, self.lanes, functions.consts)
        self.consts = self.donors.copied_consts(functions.consts, self.lanes)
        self.functions = functions._replace(consts=self.consts)
        self.like, self.last, self.most = trail.first, trail.last, jnp.max(trail.steps)
        self.first: Row = self.donors.copied(self._first(trail))
        self.memory = self.functions.memory(self.first.t0)
        self.t1 = self.donors.copied(start.t1)
        self.floor = end_floor(self.t1)
        self.of: Array | None = None  # whose rows a lane reads, if these are not its own

    def along(self, count: int) -> "StepPullback":
        """The same for `count` steps of every lane at once, each a lane of its own."""
        chunk, lanes = copy.copy(self), self.lanes.along(count)
        outer = math.prod(self.lanes.sizes[: self.lanes.outer])

        def repeated(x: Array) -> Array:
            x = x.reshape(outer, 1, self.lanes.count // outer, *x.shape[1:])
            x = jnp.broadcast_to(x, (outer, count, *x.shape[2:]))
            return x.reshape(lanes.count, *x.shape[3:])

        chunk.lanes, chunk.functions = lanes, self.functions._replace(lanes=lanes)
        chunk.of = repeated(jnp.arange(self.lanes.count, dtype=jnp.int32))
        several = (self.steps, self.first, self.ts_index)
        chunk.steps, chunk.first, chunk.ts_index = jax.tree.map(repeated, several)
        return chunk

    def read(self, rows: PyTree[Array], index: Array) -> PyTree[Array]:
        """A row of every lane."""
        if self.of is None:
            return tapes.get(rows, index)
        take = lambda x: x.at[index, self.of].get(mode="promise_in_bounds")
        return jax.tree.map(take, rows)

    def reached(self, t1: Array) -> tuple[Array, ...]:
        """How many save times, per `SubSaveAt`, lie before the end of the step."""
        assert self.of is not None
        out = []
        for ts, most in zip(self.ts, self.ts_index, strict=True):
            before = jax.vmap(lambda ts, t: jnp.searchsorted(ts, t, side="right"))
            count = before(ts.T[self.of], t1).astype(most.dtype) if ts.shape[0] else most
            out.append(jnp.minimum(count, most))
        return tuple(out)

    def _first(self, trail: Trail) -> Row:
        """The first step that was accepted."""
        tape = trail.tape
        if tape.rows is not None or tape.knots is None:
            return trail.first
        row = tapes.get(tape.knots, jnp.zeros((), jnp.int32))
        ends = tapes.unpack(row, tapes.ends(trail.first))
        return trail.first._replace(t1=ends.t1)

    def final(self, cotangents: Cotangents) -> BackwardCarry:
        """What the backward loop begins with: nothing in lanes that failed."""
        y, state = masked(self.steps >= 0, (cotangents.y, cotangents.state))
        return BackwardCarry(y, state, self.wanted, self.ts_index, self.memory)

    def load(self, k: Array, row: Rows) -> Row:
        """Step k in every lane that has one, else a harmless one."""
        loaded = tapes.unpack(row, self.like)
        return trees.where(k < self.steps, loaded, self.first)  # type: ignore[return-value]

    def standing(self, row: Row) -> Standing:
        """Where the lanes stand at the start of a step; a cache only if the tape has it."""
        blank = lambda x: jnp.zeros((self.lanes.count, *x.shape), x.dtype)
        state, cache = row.inner, jax.tree.map(blank, self.traced.cache.out)
        if self.traced.hands_over:
            state, cache = row.inner
        jump = jumped(row)
        return Standing(row.y, state, cache, jump, row.t0, row.t1, row.controller, row.before)

    def with_cache(self, at: Standing, anew: Array) -> Standing:
        """The same, with a cache where it is not known yet."""
        if self.traced.hands_over or not jax.tree.leaves(at.cache):
            return at
        evaluate = lambda: self.functions(self.traced.cache, at.tprev, at.y, at.state)
        return at._replace(cache=jax.lax.cond(anew, evaluate, lambda: at.cache))

    def row_of(self, at: Standing) -> Row:
        """What is kept of where the lanes stand."""
        return row_of(self.functions, at, self.plan)

    def advance(
        self, k: Array, at: Standing, memory: PyTree[Array]
    ) -> tuple[Standing, Standing, PyTree[Array]]:
        """Where the lanes stand before and behind step k, and the memory of the noise. Those without
        a step more go to their first one."""
        if self.traced.uniform:
            step, memory = tried(self.functions, at, self.t1, self.floor, memory)
            every = jnp.ones(self.steps.shape, bool)
            behind = moved(at, step, every, every)
        else:
            at, behind, memory = self._until_accepted(k, at, memory)
        if self.traced.jumps and jax.tree.leaves(at.cache):
            behind = refreshed(self.functions, behind, k < self.steps)
        first = self.standing(self.first)
        if not self.traced.hands_over:
            first = first._replace(cache=behind.cache)
        behind = trees.where(k + 1 < self.steps, behind, first)
        return at, behind, memory  # type: ignore[return-value]

    def must_try(self, k: Array) -> Array:
        """1 if it is not on the tape where step k ends, else 0."""
        if self.traced.uniform:
            return jnp.zeros_like(k)
        return (self._following(k) != k).astype(k.dtype)

    def _following(self, k: Array) -> Array:
        """The first step from k on whose end is on the tape."""
        assert self.plan.knots is not None
        apart = jnp.left_shift(1, tapes.doublings(self.most, self.plan.knots.slots))
        return (k + apart - 1) & -apart

    def _known(self, k: Array) -> tuple[Row, Array]:
        """What the tape says of the end of step k: where it is, or what it cannot lie behind; and
        in which lanes it is there."""
        keep, following = self.plan.knots, self._following(k)
        assert keep is not None and self.tape.knots is not None
        rows = tapes.get(self.tape.knots, tapes.slot(following, keep.slots))
        row = tapes.unpack(rows, tapes.ends(self.like))
        t1 = jnp.where(following < self.steps, row.t1, self.t1)
        return row._replace(t1=t1), (following == k) & (k < self.steps)

    def _until_accepted(
        self, k: Array, at: Standing, memory: PyTree[Array]
    ) -> tuple[Standing, Standing, PyTree[Array]]:
        """Tries step k until every lane accepts it. One whose end is known is accepted there."""
        end, known = self._known(k)

        def attempt(carry: tuple[Array, Standing, Standing, PyTree[Array]]):
            done, at, behind, memory = carry
            bound = jnp.where(known, end.t1, jnp.minimum(behind.tnext, end.t1))
            trying = behind._replace(tnext=jnp.where(done, behind.tnext, bound))
            step, memory = tried(self.functions, trying, self.t1, self.floor, memory)
            forced = known | ~(trying.tnext > trying.tprev)
            accept = ~done & (step.accept | forced)
            # One that the controller would reject, as it sees another last digit, ends all the same.
            refused = accept & ~step.accept
            tprev = jnp.where(refused, trying.tnext, step.tprev)
            tnext = jnp.where(refused, tprev + (step.tnext - step.tprev), step.tnext)
            at = trees.where(accept, trying, at)
            behind = moved(trying, step._replace(tprev=tprev, tnext=tnext), ~done, accept)
            return done | accept, at, behind, memory

        cond = lambda carry: ~jnp.all(carry[0])
        begin = (k >= self.steps, at, at, memory)
        _, at, behind, memory = jax.lax.while_loop(cond, attempt, begin)
        following, known = self._known(k + 1)
        behind = behind._replace(tnext=jnp.where(known, following.t1, behind.tnext))
        if self.traced.jumps and following.jump is not None:
            behind = behind._replace(
                tprev=jnp.where(known, following.t0, behind.tprev),
                made_jump=jnp.where(known, following.jump, behind.made_jump),
            )
        return at, behind, memory

    def step(self, k: Array, loaded: Row, ct: BackwardCarry) -> BackwardCarry:
        """From the cotangents behind step k to those before it."""
        active = k < self.steps
        increments, memory = self.functions.draw(loaded.t0, loaded.t1, ct.memory)
        ct = ct._replace(memory=memory)
        ct, ct_dense = self.outputs(k, active, loaded, increments, ct)
        advance, x, aux = self.differentiated(loaded, increments)
        behind = masked(active, (ct.y, ct.inner))
        ct_judged = None if self.judged is None else masked(active, self.read(self.judged, k))
        ct_out = (*behind, ct_dense, ct_judged)
        uses = self.traced.advance.uses
        _, ct_consts, ct_x = self.transpose(advance, uses, x, aux, ct_out)
        y, inner = trees.where(active, ct_x, (ct.y, ct.inner))
        return ct._replace(y=y, inner=inner, consts=added(ct.consts, ct_consts))

    def differentiated(self, loaded: Row, increments: PyTree[Array]):
        """A step as a function of one lane, `fn(consts, x, aux)`; and where it is to be differentiated,
        x, with what is given besides."""
        moving, fixed = eqx.partition(loaded.inner, eqx.is_inexact_array)

        def advance(consts: list[Array], x: Array, aux: PyTree[Array]):
            (y, moving), (fixed, *rest) = x, aux
            out = self.traced.advance(consts, y, eqx.combine(moving, fixed), *rest)
            y1, inner, dense, judged = out
            return y1, _inexact(inner), dense, _asked(judged, self.judged)

        aux = (fixed, loaded.t0, loaded.t1, jumped(loaded), increments)
        return advance, (loaded.y, moving), aux

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

    def outputs(self, k, active, loaded: Row, increments, ct: BackwardCarry):
        """Adds the cotangents of what was saved in step k, and returns those of its dense output."""
        if all(save.at_time is None and save.at_step is None for save in self.traced.saves):
            return ct, None
        t0, t1 = loaded.t0, loaded.t1
        at = (loaded.y, loaded.inner, t0, t1, jumped(loaded))
        y1, _, dense, _ = self.functions(self.traced.advance, *at, increments)
        ct_dense = trees.zeros_like(dense)
        before = jnp.where(k == 0, -jnp.inf, t0 if loaded.before is None else loaded.before)
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
        ct_out = self.read(self.saved[j], row)
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
            t = self.read(self.ts[j], jnp.maximum(index - 1, 0))
            return t, active & (index > 0) & (t > before)

        def cond(carry: Any):
            return jnp.any(last_time(carry[0])[1])

        def body(carry: tuple[Array, PyTree, dict[int, Array]]):
            index, ct_dense, ct_all = carry
            t, due = last_time(index)
            row = jnp.where(due, save.output_row(index - 1, jnp.broadcast_to(k, due.shape)), 0)
            ct_out, aux = self.read(self.saved[j], row), (t0, t1, jnp.where(due, t, t1))
            ct_consts, ct_here = self._output(at_time, save, fn.uses, due, dense, aux, ct_out)
            ct_dense = trees.add(ct_dense, ct_here)
            return index - due.astype(jnp.int32), ct_dense, added(ct_all, ct_consts)

        index, ct_dense, ct_consts = jax.lax.while_loop(
            cond, body, (ct.ts_index[j], ct_dense, ct.consts)
        )
        ts_index = tuple(index if i == j else n for i, n in enumerate(ct.ts_index))
        return ct._replace(consts=ct_consts, ts_index=ts_index), ct_dense


def jumped(row: Row) -> Array:
    """Whether the field jumped at the start of a step."""
    return jnp.zeros(row.t0.shape, bool) if row.jump is None else row.jump


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

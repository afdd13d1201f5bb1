r"""The backward loop: replay a chunk of steps from its stored state, then pull back step by step.

With stride m between stored states and n accepted steps, chunk c holds the steps c m .. c m + m - 1:

    for c = last .. 0:
        y = stored state c m;  replay the chunk, keeping every state          (at most 1 F per step)
        for k = last of the chunk .. first:
            add the cotangents of what was saved at or inside step k
            (ct_y, ct_consts) += transposed derivative of step k              (1 F + 1 B per step)

A lane with fewer steps waits until its own last step comes by. While it waits it evaluates a step of
its own with cotangent zero. A lane that failed has no step that is safe to evaluate: it borrows one
(`donors`), and contributes exactly nothing.
"""

from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from nde.solvers import tape as tapes
from nde.solvers.donors import donors
from nde.solvers.engine import Cotangents
from nde.solvers.forward import Moving, choose
from nde.solvers.heuristics import Judged
from nde.solvers.hoist import Hoisted
from nde.solvers.lanes import Batch
from nde.solvers.program import Save, Traced
from nde.solvers.tape import Tape


class Trail(NamedTuple):
    """What the forward loop left behind."""

    tape: Tape
    steps: Int[Array, " lanes"]  # accepted steps; -1 where the solve failed
    ts_index: tuple[Int[Array, " lanes"], ...]  # how many save times were reached, per `SubSaveAt`


def kept_trail(out: Moving) -> Trail:
    """The trail of a forward loop, with a row axis as kept arrays have it."""
    steps = jnp.where(out.result == 0, out.accepted, -1)
    return Trail(cast(Tape, out.tape), steps[None], tuple(i[None] for i in out.ts_index))


def opened(trail: Trail) -> Trail:
    """The inverse."""
    return trail._replace(steps=trail.steps[0], ts_index=tuple(i[0] for i in trail.ts_index))


class Loaded(NamedTuple):
    """One step of every lane, ready to be evaluated."""

    y: PyTree[Array]
    state: PyTree[Array]
    t0: Array
    t1: Array
    made_jump: Array


class Running(NamedTuple):
    """The cotangents at the present step, going backwards."""

    y: PyTree[Array]
    state: PyTree[Array]
    consts: dict[int, Array]
    ts_index: tuple[Array, ...]
    memory: PyTree[Array]  # of the noise


def run(
    traced: Traced,
    consts: list[Array],
    ts: tuple[Array, ...],
    batch: Batch,
    trail: Trail,
    cotangents: Cotangents,
    wanted: dict[int, Array],
    longest: int,
) -> Running:
    """Pulls cotangents back to the initial value and to the constants in `wanted` (zeros to add to).

    `longest`: the longest chunk, known from `max_steps`.
    """
    pull = Pull(traced, consts, ts, batch, trail, cotangents, wanted)
    first = tapes.get(trail.tape.states, jnp.zeros((), jnp.int32))
    # Nothing depends on the last cache.
    cache = jax.tree.map(jnp.zeros_like, first[1][1]) if traced.hands_over else None
    inner = traced.inner(pull.alive(cotangents.state), cache)
    ct = Running(pull.alive(cotangents.y), inner, wanted, trail.ts_index, pull.memory)
    ct = _to_start(pull, trail, first, ct, longest)
    if not traced.hands_over:
        return ct
    # Where no lane took a step there is none to borrow, and the field may be undefined.
    none = lambda: ct._replace(state=ct.state[0])
    return jax.lax.cond(jnp.any(trail.steps > 0), lambda: pull.first_cache(first, ct), none)


def _to_start(
    pull: "Pull", trail: Trail, first: PyTree[Array], ct: Running, longest: int
) -> Running:
    """Pulls back to the first step, whose state is `first`."""
    steps, slots = trail.steps, jax.tree.leaves(trail.tape.states)[0].shape[0] - 1
    most = jnp.max(steps)
    if longest == 1:  # every state is there
        stored = lambda k: tapes.get(trail.tape.states, tapes.slot(k, slots))
        return pull.steps_back(jnp.zeros_like(most), most, stored, ct)
    length = tapes.stride(most, slots)

    def pull_chunk(i: Array, carry: tuple[Running, PyTree[Array]]):
        k0 = length * ((most - 1) // length - i)
        state = tapes.get(trail.tape.states, tapes.slot(k0, slots))
        return chunk(
            pull, k0, jnp.minimum(length, most - k0), choose(steps > k0, state, first), *carry
        )

    chunks = jnp.where(most > 0, (most - 1) // length + 1, 0)
    return jax.lax.fori_loop(0, chunks, pull_chunk, (ct, tapes.blank(first, longest)))[0]


def chunk(
    pull: "Pull", k0: Array, length: Array, state: PyTree[Array], ct: Running, kept: PyTree[Array]
) -> tuple[Running, PyTree[Array]]:
    """Replays `length` steps from the state at step k0, then pulls back through them.

    `kept`: rows for at least `length` states, to be overwritten.
    """

    def replay(j, carry):
        state, kept, memory = carry
        kept = tapes.put(kept, j, state)
        after, memory = pull.advance(k0 + j, state, memory)
        return choose(k0 + j + 1 < pull.steps, after, state), kept, memory

    carry = (state, kept, ct.memory)
    state, kept, memory = jax.lax.fori_loop(0, length - 1, replay, carry)
    ct = ct._replace(memory=memory)
    kept = tapes.put(kept, length - 1, state)
    return pull.steps_back(k0, length, lambda k: tapes.get(kept, k - k0), ct), kept


class Pull:
    """One step of the backward pass. Holds what does not change from step to step."""

    def __init__(
        self,
        traced: Traced,
        consts: list[Array],
        ts: tuple[Array, ...],
        batch: Batch,
        trail: Trail,
        cotangents: Cotangents,
        wanted: dict[int, Array],
    ):
        self.traced, self.ts, self.batch = traced, ts, batch
        self.tape, self.steps, self.wanted = trail.tape, trail.steps, wanted
        self.saved, self.judged = cotangents.saved_ys, cotangents.judged
        self.donors = donors(trail.steps, batch, consts)
        lend = self.donors.lend_const
        self.consts = [lend(x, has, batch) for x, has in zip(consts, batch.levels, strict=False)]
        t0 = tapes.get(trail.tape.knots, jnp.zeros((), jnp.int32))
        self.memory = traced.memory_of(self.consts, batch, t0)
        self.draw = traced.drawing(self.consts, batch)
        self._advance = batch.per_lane(traced.advance)

    def alive(self, ct: PyTree[Array]) -> PyTree[Array]:
        """Cotangents, without those of lanes that failed."""
        return masked(self.steps >= 0, ct)

    def load(self, k: Array, state: PyTree[Array]) -> Loaded:
        """Step k from `state` in every lane that has one, else a harmless one."""
        return Loaded(*self.donors.lend((*state, *self.times(k))))

    def times(self, k: Array) -> tuple[Array, Array, Array]:
        """Where step k starts and ends in every lane that has one, else another step of the lane."""
        if not self.traced.uniform:
            k = jnp.clip(jnp.broadcast_to(k, self.steps.shape), 0, jnp.maximum(self.steps - 1, 0))
        return tapes.times(self.tape, k)

    def advance(self, k: Array, state: PyTree[Array], memory: PyTree[Array]):
        """The state behind step k, and the memory of the noise."""
        y, inner, t0, t1, jump = self.load(k, state)
        increments, memory = self.draw(t0, t1, memory)
        return self._advance(self.consts, y, inner, t0, t1, jump, increments)[:2], memory

    def steps_back(self, k0: Array, count: Array, stored, ct: Running) -> Running:
        """Pulls back through `count` steps from step k0 on; `stored(k)` is the state before step k."""

        def step(i: Array, carry: tuple[Running, Loaded]):
            ct, loaded = carry
            k = k0 + count - 1 - i
            ct = self.step(k, loaded, ct)
            # Loaded ahead, a step is read once and not by each of its stages.
            before = jnp.maximum(k - 1, k0)
            return ct, self.load(before, stored(before))

        last = jnp.maximum(k0 + count - 1, k0)
        return jax.lax.fori_loop(0, count, step, (ct, self.load(last, stored(last))))[0]

    def step(self, k: Array, loaded: Loaded, ct: Running) -> Running:
        """From the cotangents behind step k to those before it."""
        active = k < self.steps
        y, inner, t0, t1, jump = loaded
        moving, fixed = eqx.partition(inner, eqx.is_inexact_array)
        increments, memory = self.draw(t0, t1, ct.memory)
        ct = ct._replace(memory=memory)
        ct, ct_dense = self._outputs(k, active, y, inner, t0, t1, jump, increments, ct)

        def advance(consts, x, aux):
            (y, moving), (fixed, *rest) = x, aux
            out = self.traced.advance(consts, y, eqx.combine(moving, fixed), *rest)
            y1, inner, dense, judged = out
            return y1, _inexact(inner), dense, _asked(judged, self.judged)

        zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        behind = choose(active, (ct.y, ct.state), zero((ct.y, ct.state)))
        aux = (fixed, t0, t1, jump, increments)
        ct_out = (*behind, ct_dense, self._judgement(k, active))
        return self._pulled(advance, (y, moving), aux, ct_out, active, ct)

    def first_cache(self, first: PyTree[Array], ct: Running) -> Running:
        """From the cotangents of the first cache to those of what it was evaluated from."""
        loaded, (ct_state, ct_cache) = self.load(jnp.zeros((), jnp.int32), first), ct.state
        evaluate = lambda consts, y, aux: self.traced.cache(consts, aux[0], y, aux[1])
        aux = (loaded.t0, loaded.state[0])
        _, ct_consts, ct_y = self.transpose(
            evaluate, self.traced.cache.uses, loaded.y, aux, self.alive(ct_cache)
        )
        y = jax.tree.map(jnp.add, ct.y, self.alive(ct_y))
        return ct._replace(y=y, state=ct_state, consts=added(ct.consts, ct_consts))

    def _judgement(self, k: Array, active: Array) -> Judged | None:
        """The cotangents of the estimates of step k, where anything depends on them."""
        return None if self.judged is None else masked(active, tapes.get(self.judged, k))

    def _pulled(self, fn, x, aux, ct_out, active, ct: Running) -> Running:
        uses = self.traced.advance.uses
        _, ct_consts, (ct_y, ct_state) = self.transpose(fn, uses, x, aux, ct_out)
        y, state = choose(active, (ct_y, ct_state), (ct.y, ct.state))
        return ct._replace(y=y, state=state, consts=added(ct.consts, ct_consts))

    def transpose(self, fn, uses, x, aux, ct_out):
        """The value, and the cotangents of the wanted constants (by number) and of `x`."""
        numbers = [i for i in range(len(self.consts)) if i in self.wanted and i in uses]
        wrt = [i in numbers for i in range(len(self.consts))]
        pull = self.batch.pull(fn, wrt)
        value, ct_consts, ct_x = pull(self.consts, x, aux, ct_out)
        return value, dict(zip(numbers, ct_consts, strict=True)), ct_x

    def filled(self, ct_consts: dict[int, Array]) -> dict[int, Array]:
        """With zeros for the wanted constants that are missing."""
        return {i: ct_consts.get(i, jnp.zeros_like(x)) for i, x in self.wanted.items()}

    def _outputs(self, k, active, y, inner, t0, t1, jump, increments, ct: Running):
        """Adds the cotangents of what was saved in step k, and returns those of its dense output."""
        if all(save.at_time is None and save.at_step is None for save in self.traced.saves):
            return ct, None
        y1, _, dense, _ = self._advance(self.consts, y, inner, t0, t1, jump, increments)
        ct_dense = jax.tree.map(jnp.zeros_like, dense)
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

    def at_step(self, j, save: Save, fn: Hoisted, k, active, t1, y1, ct: Running) -> Running:
        due = active & ((k + 1) % save.every == 0)
        row = jnp.where(due, save.row(ct.ts_index[j], k + 1) - 1, 0)
        ct_out = masked(due, tapes.get(self.saved[j], row))
        at_step = lambda consts, y, t: _inexact(fn(consts, t, y))
        _, ct_consts, ct_y = self.transpose(at_step, fn.uses, y1, t1, ct_out)
        return ct._replace(
            y=jax.tree.map(jnp.add, ct.y, masked(due, ct_y)), consts=added(ct.consts, ct_consts)
        )

    def _at_times(
        self, j, save: Save, fn: Hoisted, k, active, before, t0, t1, dense, ct: Running, ct_dense
    ) -> tuple[Running, PyTree[Array]]:
        def at_time(consts, dense, aux):
            t0, t1, t = aux
            return _inexact(fn(consts, t0, t1, dense, t))

        def last_time(index):
            t = tapes.get(self.ts[j], jnp.maximum(index - 1, 0))
            return t, active & (index > 0) & (t > before)

        def cond(carry):
            return jnp.any(last_time(carry[0])[1])

        def body(carry: tuple[Array, PyTree, dict[int, Array]]):
            index, ct_dense, ct_all = carry
            t, due = last_time(index)
            row = jnp.where(due, save.row(index - 1, jnp.broadcast_to(k, due.shape)), 0)
            ct_out = masked(due, tapes.get(self.saved[j], row))
            aux = (t0, t1, jnp.where(due, t, t1))
            _, ct_consts, ct_here = self.transpose(at_time, fn.uses, dense, aux, ct_out)
            ct_dense = jax.tree.map(jnp.add, ct_dense, masked(due, ct_here))
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
    return {i: total[i] + part[i] if i in part else total[i] for i in total}


def masked(where: Bool[Array, " lanes"], ct: PyTree[Array]) -> PyTree[Array]:
    return choose(where, ct, jax.tree.map(jnp.zeros_like, ct))

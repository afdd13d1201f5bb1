"""From a diffrax solve to a lane-aware program, and back to diffrax's final state.

`AbstractSolve` is what the adjoints share: the layout of operands and results, and the forward loop. An
adjoint adds what it keeps for the backward pass, and the backward pass itself.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.adjoint import forward
from nde.solvers.adjoint.forward import Moving
from nde.solvers.adjoint.stepper import AbstractStepper
from nde.solvers.adjoint.tape import Doubling, Every
from nde.solvers.adjoint.traced import (
    Start,
    Traced,
    all_finite,
    code,
    from_code,
    inner_saves,
    is_inner,
    saves,
)
from nde.solvers.estimates.estimates import Judged
from nde.solvers.lanes import primitives as lanes
from nde.solvers.lanes.donors import rejoined, separated
from nde.solvers.lanes.outside_loop import differentiated
from nde.solvers.lanes.primitives import Batch, Slot

_DIFFERENTIABLE = ("y", "state", "saved_ys", "judged")
_ROWED = ("saved_ts", "saved_ys", "judged")
_NAMES = {"tprev": "`t0`", "t1": "`t1`", "ts": "`SaveAt(ts=...)`", "tnext": "`dt0`"}
_CONTROLLER = "the step size controller"


class Cotangents(NamedTuple):
    """Of the results of a solve, in all lanes; zeros where nothing depends on one."""

    y: PyTree[Array]
    state: PyTree[Array]  # the inexact leaves
    saved_ys: tuple[PyTree[Array] | None, ...]  # None where nothing depends on any row
    judged: Judged | None  # likewise, and so are its entries


class Gradients(NamedTuple):
    """Of the operands: lane by lane for the start, summed over lanes for the constants."""

    y: PyTree[Array]
    state: PyTree[Array]
    consts: dict[int, Array]


class AbstractSolve(abc.ABC):
    """One traced solve, as a program for `lanes`."""

    adjoint: ClassVar[str]  # for error messages
    examines: bool = False  # whether `examine` reads the tape

    def __init__(self, traced: Traced, start: Start, max_steps: int):
        self.traced, self.max_steps = traced, max_steps
        self._start = jax.eval_shape(lambda: start)
        operands = traced.pool.consts + jax.tree.leaves(start)
        single = Batch((), ((),) * len(operands))
        # The loop ends with the shapes it begins with: no need to trace it.
        out = jax.eval_shape(lambda xs: self._run(xs, single, True, forward.first), operands)
        kept = jax.eval_shape(self.keep, out)
        self._out, self._kept = _bare(out), jax.tree.structure(kept)
        self.results = _slots(self._out)
        self.kept = tuple(_slot(x, rowed=True) for x in jax.tree.leaves(kept))

    @abc.abstractmethod
    def states(self) -> Doubling | Every:
        """Which states the forward loop writes down."""

    @abc.abstractmethod
    def keep(self, out: Moving) -> PyTree[Array]:
        """What the backward pass needs of the forward loop; arrays with rows, then lanes."""

    @abc.abstractmethod
    def pull_back(
        self,
        traced: Traced,
        consts: list[Array],
        start: Start,
        batch: Batch,
        kept: PyTree[Array],
        ct: Cotangents,
        wanted: dict[int, Array],
    ) -> Gradients:
        """The backward loop. `traced.uniform`: all lanes have as many steps. `wanted`: zeros to add
        the cotangents of constants to.
        """

    def solve(self, start: Start) -> Moving:
        """Runs the forward loop from `start`, in one lane; `vmap` and `grad` follow `lanes`."""
        out = lanes.solve(self, self.traced.pool.consts + jax.tree.leaves(start))
        return jax.tree.unflatten(jax.tree.structure(self._out), out)

    # --- what `lanes` asks for ---

    def check_perturbed(self, perturbed: tuple[bool, ...]) -> None:
        """Refuses derivatives with respect to times and controllers, never a silent zero."""
        n = len(self.traced.pool.consts)
        moving = jax.tree.unflatten(jax.tree.structure(self._start), perturbed[n:])
        names = [
            name for field, name in _NAMES.items() if any(jax.tree.leaves(getattr(moving, field)))
        ]
        used = self.traced.differentiable()
        stray = any(p and i not in used for i, p in enumerate(perturbed[:n]))
        if stray or any(jax.tree.leaves(moving.controller_state)):
            names.append(_CONTROLLER)
        if names:
            raise ValueError(
                f"A derivative with respect to {names[0]} was asked for, but {self.adjoint} has none: "
                "steps carry no gradient. Wrap it in `jax.lax.stop_gradient`, or use "
                "`adjoint=diffrax.DirectAdjoint()`."
            )

    def forward(self, operands: list[Array], batch: Batch, keep: bool) -> list[Array]:
        """The results of the loop and, if `keep`, what the backward pass needs."""
        out = self._run(operands, batch, keep, forward.run)
        arrays = jax.tree.leaves(_bare(out)) + (jax.tree.leaves(self.keep(out)) if keep else [])
        slots = self.results + (self.kept if keep else ())
        return [_shaped(x, slot, batch.sizes) for x, slot in zip(arrays, slots, strict=True)]

    def backward(self, operands, batch: Batch, kept, cotangents, perturbed) -> list[Array]:
        """The cotangents of the perturbed operands, from those of the results (None: zero)."""
        n = len(self.traced.pool.consts)
        start = self._spread(operands, batch)
        own, consts = separated(batch, operands[:n])
        kept = [_flat(x, slot, batch) for x, slot in zip(kept, self.kept, strict=True)]
        trail = jax.tree.unflatten(self._kept, kept)
        wanted = {i: _zeros(consts[i], own, i) for i in range(n) if perturbed[i]}
        ct = self._cotangents(cotangents, batch, start)
        out = self.pull_back(self._traced_for(batch), consts, start, own, trail, ct, wanted)
        states = jax.tree.structure(start.state).flatten_up_to(out.state)
        moved = [rejoined(batch, own, i, total) for i, total in out.consts.items()]
        for i, leaf in enumerate(jax.tree.leaves(out.y) + states, start=n):
            if perturbed[i]:
                moved.append(batch.gather(leaf, batch.levels[i]))
        return moved

    def _traced_for(self, batch: Batch) -> Traced:
        """Lanes whose times or controllers differ may stand at different steps."""
        n, used = len(self.traced.pool.consts), self.traced.differentiable()
        start = jax.tree.unflatten(jax.tree.structure(self._start), batch.levels[n:])
        own = [start.tprev, start.tnext, start.t1, start.controller_state]
        own += [has for i, has in enumerate(batch.levels[:n]) if i not in used]
        together = self.traced.uniform and not any(jax.tree.leaves(own))
        return dataclasses.replace(self.traced, uniform=together)

    # --- layout ---

    def _run(self, operands: list[Array], batch: Batch, keep: bool, run) -> Moving:
        consts = operands[: len(self.traced.pool.consts)]
        start = self._spread(operands, batch)
        states = self.states() if keep or self.examines else None
        out = run(self.traced, consts, start, batch, self.max_steps, states)
        return out._replace(extra=self.examine(consts, start, batch, out))

    def examine(
        self, consts: list[Array], start: Start, batch: Batch, out: Moving
    ) -> PyTree[Array]:
        """What there is to say about a solve, lane by lane."""
        del consts, start, batch, out
        return ()

    def _spread(self, operands: list[Array], batch: Batch) -> Start:
        n = len(self.traced.pool.consts)
        pairs = zip(operands[n:], batch.levels[n:], strict=True)
        full = [batch.spread(x, has) for x, has in pairs]
        start = jax.tree.unflatten(jax.tree.structure(self._start), full)
        return start._replace(ts=tuple(jnp.moveaxis(ts, 0, 1) for ts in start.ts))

    def _cotangents(self, given: list[Array | None], batch: Batch, start: Start) -> Cotangents:
        shown = iter(given)
        leaves = []
        for slot in self.results:
            ct = next(shown) if slot.differentiable else None
            leaves.append(None if ct is None else _flat(ct, slot, batch))
        ct = jax.tree.unflatten(jax.tree.structure(self._out), leaves)
        wide = lambda x: jnp.zeros((x.shape[0], batch.lanes, *x.shape[2:]), x.dtype)

        def rows(ct: PyTree, like: PyTree) -> PyTree:
            return _filled(ct, jax.tree.map(wide, like)) if jax.tree.leaves(ct) else None

        saved = tuple(map(rows, ct.saved_ys, self._out.saved_ys))
        judged = ct.judged if jax.tree.leaves(ct.judged) else None
        return Cotangents(_filled(ct.y, start.y), _filled(ct.state, start.state), saved, judged)


def begin(
    stepper: AbstractStepper, saveat: diffrax.SaveAt, t1: Array, init_state: Any, passed: bool
) -> Start:
    """Where the loop starts, from what diffrax has prepared. `passed`: the solver's state is the user's."""
    ts = tuple(
        jnp.zeros((0,), t1.dtype) if sub.ts is None else sub.ts
        for sub, _ in inner_saves(saveat, init_state)
    )
    arrays = lambda tree: jax.tree.map(jnp.asarray, tree)
    state = stepper.state(init_state.solver_state)
    if jax.tree.leaves(state) and not passed:
        times = (init_state.tprev, init_state.tnext)
        state = stepper.settled(init_state.tprev, init_state.y, state)
        healthy = all_finite((init_state.y, state))
        if not saveat.solver_state:  # without a step nothing else depends on it
            healthy &= init_state.tprev < t1
        state = differentiated(stepper.init, state, healthy, *times, init_state.y)
    return Start(
        y=init_state.y,
        state=state,
        made_jump=jnp.asarray(init_state.made_jump),
        tprev=jnp.asarray(init_state.tprev, t1.dtype),
        tnext=jnp.asarray(init_state.tnext, t1.dtype),
        t1=t1,
        controller_state=arrays(init_state.controller_state),
        result=code(init_state.result),
        ts=ts,
    )


def finish(
    stepper: AbstractStepper, saveat: diffrax.SaveAt, args: Any, t0, t1, init_state: Any,
    traced: Traced, out: Moving,
) -> Any:  # fmt: skip
    """diffrax's final state. Outputs at t0 and t1 are added here, where they cost nothing."""
    saved = iter(zip(traced.saves, out.saved_ts, out.saved_ys, out.ts_index, strict=True))
    buffers = []
    for sub, blank in saves(saveat, init_state):
        inner = next(saved) if is_inner(sub) else None
        buffers.append(_outputs(sub, blank, inner, args, t0, t1, init_state.y, out))
    final = eqx.tree_at(
        lambda s: [x for _, b in saves(saveat, s) for x in (b.ts, b.ys)],
        init_state,
        [x for pair in buffers for x in pair],
    )
    fields = {
        "y": out.y, "tprev": out.tprev, "tnext": out.tnext, "controller_state": out.controller_state,
        "made_jump": out.made_jump if traced.jumps else init_state.made_jump,
        "num_steps": out.accepted + out.rejected, "num_accepted_steps": out.accepted,
        "num_rejected_steps": out.rejected, "result": from_code(out.result),
    }  # fmt: skip
    if saveat.solver_state:
        at = (out.tprev, out.y, out.state)
        state = stepper.final_state(*at)
        fields["solver_state"] = differentiated(stepper.final_state, state, out.result == 0, *at)
    return eqx.tree_at(
        lambda s: [getattr(s, name) for name in fields],
        final,
        list(fields.values()),
        is_leaf=lambda x: x is None,
    )


def _outputs(
    sub: diffrax.SubSaveAt, blank: Any, inner: tuple | None, args: Any, t0, t1, y0, out: Moving
) -> tuple[Array, PyTree[Array]]:
    """The rows of one `SubSaveAt`: those of the loop, and those at its two ends."""
    ts, ys, row, at_end = blank.ts, blank.ys, int(sub.t0), bool(sub.t1)

    def output(t, y):
        """What is saved of a state; nothing depends on it where the solve failed."""
        fn = lambda t, y: jax.tree.map(jnp.asarray, sub.fn(t, y, args))
        return differentiated(fn, fn(t, y), out.result == 0, t, y)

    if inner is not None:
        save, ts, ys, index = inner
        ts = jnp.where(jnp.isinf(ts), blank.ts, ts)
        row = save.row(index, out.accepted)
        if save.times:
            rows = slice(save.offset, save.offset + save.times)
            fill = lambda ts, ys: _write(ts, ys, rows, t0, output(t0, out.y))
            ts, ys = jax.lax.cond(t0 == t1, fill, lambda ts, ys: (ts, ys), ts, ys)
            row = jnp.where(t0 == t1, rows.stop, row)
        if save.every:
            there = out.accepted % save.every == 0
            row, at_end = jnp.where(there, save.rows, row), at_end and save.every > 1
    if sub.t0:
        ts, ys = _write(ts, ys, 0, t0, output(t0, y0))
    if at_end:
        ts, ys = _write(ts, ys, row, out.tprev, output(out.tprev, out.y))
    return ts, ys


def _write(ts: Array, ys: PyTree[Array], row, t: Array, y: PyTree[Array]):
    put = lambda rows, x: rows.at[row].set(jnp.asarray(x, rows.dtype), mode="drop")
    return put(ts, t), jax.tree.map(put, ys, y)


def _bare(out: Moving) -> Moving:
    return out._replace(tape=None)


def _slot(x: Any, rowed: bool = False, differentiable: bool = False) -> Slot:
    """The layout of an array that was computed with one flat lane."""
    shape = (x.shape[0], *x.shape[2:]) if rowed else x.shape[1:]
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return Slot(shape, x.dtype, rowed, differentiable and inexact)


def _slots(out: Moving) -> tuple[Slot, ...]:
    slots = []
    for name in out._fields:
        for x in jax.tree.leaves(getattr(out, name)):
            slots.append(_slot(x, name in _ROWED, name in _DIFFERENTIABLE))
    return tuple(slots)


def _shaped(x: Array, slot: Slot, sizes: tuple[int, ...]) -> Array:
    """From one flat lane axis to the levels."""
    axis = 1 if slot.rowed else 0
    return x.reshape(x.shape[:axis] + sizes + x.shape[axis + 1 :])


def _flat(x: Array, slot: Slot, batch: Batch) -> Array:
    """The inverse of `_shaped`."""
    axis = 1 if slot.rowed else 0
    return x.reshape(x.shape[:axis] + (batch.lanes,) + x.shape[axis + len(batch.sizes) :])


def _zeros(const: Array, batch: Batch, i: int) -> Array:
    has, outer = batch.levels[i], batch.outer
    return jnp.zeros(batch.sizes[:outer] + const.shape[sum(has[:outer]) :], const.dtype)


def _filled(ct: PyTree, like: PyTree[Array]) -> PyTree[Array]:
    """Zeros for what is missing, None for what cannot move."""

    def fill(c, x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return None
        return jnp.zeros_like(x) if c is None else c

    leaves, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, map(fill, tree.flatten_up_to(ct), leaves))

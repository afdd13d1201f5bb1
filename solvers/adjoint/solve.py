"""One traced solve as a program for `lanes`: its forward loop, and what the adjoints share of the way back.

An adjoint adds which states it keeps for the backward pass, and the backward loop itself.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.backward import BackwardCarry, Cotangents
from nde.solvers.adjoint.forward import ForwardCarry, initial_carry, row_of, run_forward
from nde.solvers.adjoint.tape import Plan, Trail
from nde.solvers.adjoint.traced import LaneFunctions, Start, Traced
from nde.solvers.lanes import primitives
from nde.solvers.lanes.batch import Lanes, lane_shapes
from nde.solvers.lanes.donors import cleared

_DIFFERENTIABLE = ("y", "state", "saved_ys", "judged")
_TIMED = ("tprev", "tnext", "controller_state", "saved_ts")
_ROWED = ("saved_ts", "saved_ys", "judged")


class AbstractSolve(abc.ABC):
    """One traced solve, as a `primitives.Program`."""

    adjoint: ClassVar[str]  # for error messages
    keeps_end: ClassVar[bool]  # whether the backward loop begins with the last state
    # What there is to say about a solve, lane by lane, off its tape.
    examine: Callable[[LaneFunctions, Start, ForwardCarry], dict[str, Array]] | None = None

    def __init__(self, traced: Traced, start: Start, max_steps: int):
        # A program outlives the trace that it is made in: it keeps no array.
        self.traced, self.max_steps = traced.bare(), max_steps
        self.consts, self.args = len(traced.pool.consts), jax.tree.structure(start)
        self._times = traced.tick.needs
        lanes = Lanes((), ((),) * self.consts)

        def begun(consts: list[Array], start: Start) -> tuple[ForwardCarry, Trail | None]:
            start = jax.tree.map(lambda x: jnp.asarray(x)[None], start)
            return self._solved(lanes, consts, start, True, initial_carry)

        # The loop ends with the shapes it begins with: no need to trace it.
        out, trail = jax.eval_shape(begun, traced.pool.consts, start)
        shapes = lambda name: lane_shapes(
            getattr(out, name),
            rowed=name in _ROWED,
            differentiable=name in _DIFFERENTIABLE,
            timed=name in _TIMED,
        )
        self.results = ForwardCarry(**{name: shapes(name) for name in out._fields})
        self.residuals = jax.tree.map(_residuals, trail, is_leaf=_has_times)

    @abc.abstractmethod
    def plan(self) -> Plan:
        """Which rows the forward loop writes down."""

    @abc.abstractmethod
    def pull_back(
        self,
        functions: LaneFunctions,
        start: Start,
        trail: Trail,
        cts: Cotangents,
        wanted: dict[int, Array],
    ) -> BackwardCarry:
        """The backward loop. `wanted`: zeros to add the cotangents of constants to."""

    def solve(self, consts: list[Array], start: Start) -> ForwardCarry:
        """Runs the forward loop from `start`, in one lane; `vmap` and `grad` follow `lanes`."""
        return primitives.solve(self, consts, start)

    def timed(self, perturbed: tuple[bool, ...]) -> set[int]:
        """Which of the operands that are perturbed move times."""
        start = jax.tree.unflatten(self.args, range(len(perturbed) - self.consts))
        still = {self.consts + i for i in jax.tree.leaves((start.y, start.state))}
        still |= set(range(self.consts)) - self._times
        return {i for i, p in enumerate(perturbed) if p and i not in still}

    def plain(self, lanes: Lanes, consts: list[Array], args: Start) -> ForwardCarry:
        """The results of the loop; where it failed they have no derivative."""
        out, _ = self._solved(lanes, consts, args, False, run_forward)
        healthy = out.result == 0

        def held(name: str, x: Array) -> Array:
            rowed = (1, -1) if name in _ROWED else (-1,)
            mask = healthy.reshape(rowed + (1,) * (x.ndim - len(rowed)))
            return jnp.where(mask, x, jax.lax.stop_gradient(x))

        moving = {name: getattr(out, name) for name in _DIFFERENTIABLE + _TIMED}
        held_if = lambda name, x: held(name, x) if eqx.is_inexact_array(x) else x
        hold = lambda name, tree: jax.tree.map(lambda x: held_if(name, x), tree)
        return out._replace(**{name: hold(name, tree) for name, tree in moving.items()})

    def forward(
        self, lanes: Lanes, consts: list[Array], args: Start, record: bool
    ) -> tuple[ForwardCarry, Trail | None]:
        """The results of the loop and, if `record`, what the backward loop needs."""
        return self._solved(lanes, consts, args, record, run_forward)

    def backward(
        self,
        lanes: Lanes,
        consts: list[Array],
        args: Start,
        residuals: Trail,
        cts: ForwardCarry,
        wanted: dict[int, Array],
    ) -> tuple[dict[int, Array], Start]:
        """The cotangents of constants and of the start, from those of the results (None: zero)."""
        reached = lambda ct, shapes: lanes.filled(shapes, ct) if jax.tree.leaves(ct) else None
        given = Cotangents(
            y=lanes.filled(self.results.y, cts.y),
            state=lanes.filled(self.results.state, cts.state),
            saved_ys=tuple(map(reached, cts.saved_ys, self.results.saved_ys)),
            judged=cts.judged if jax.tree.leaves(cts.judged) else None,
        )
        functions = LaneFunctions(self.traced, lanes, consts)
        start = args._replace(ts=_row_by_row(args.ts))
        out = self.pull_back(functions, start, residuals, given, wanted)
        ct_start = jax.tree.map(lambda _: None, args)._replace(y=out.y, state=out.inner)
        return cleared(residuals.steps > 0, out.consts, lanes), ct_start

    def _solved(
        self,
        lanes: Lanes,
        consts: list[Array],
        start: Start,
        record: bool,
        loop: Callable[..., ForwardCarry],
    ) -> tuple[ForwardCarry, Trail | None]:
        start = start._replace(ts=_row_by_row(start.ts))
        plan = self.plan() if record or self.examine is not None else None
        functions = LaneFunctions(self.traced, lanes, consts)
        out = loop(functions, start, self.max_steps, plan)
        if self.examine is not None:
            out = out._replace(extra=self.examine(functions, start, out))
        tape, last, like = out.tape, out.last, out
        out = out._replace(tape=None, last=None, before=None)
        if not record or plan is None or tape is None:
            return out, None
        if tape.rows is None:
            first = row_of(functions, initial_carry(functions, start, 0, None), plan)
        else:
            first = tapes.unpack(
                tapes.get(tape.rows, jnp.zeros((), jnp.int32)), row_of(functions, like, plan)
            )
        steps = jnp.where(out.result == 0, out.accepted, -1)
        end = (out.y, out.state) if self.keeps_end else None
        return out, Trail(tape, steps, out.ts_index, first, last, end)


def _has_times(x: Any) -> bool:
    return isinstance(x, tapes.Row | tapes.Rows)


def _residuals(x: Any) -> Any:
    """The shapes of what the backward loop needs. Times are differentiable by what moves them alone."""
    if isinstance(x, tapes.Rows):
        states = lane_shapes(x.states, rowed=True, differentiable=True)
        return tapes.Rows(states, lane_shapes(x.times, rowed=True, timed=True))
    if isinstance(x, tapes.Row):
        y, inner = lane_shapes((x.y, x.inner), differentiable=True)
        return lane_shapes(tapes.times(x), timed=True)._replace(y=y, inner=inner)
    return lane_shapes(x, differentiable=True)


def _row_by_row(ts: tuple[Array, ...]) -> tuple[Array, ...]:
    """Save times, one lane beside the other."""
    return tuple(jnp.moveaxis(times, 0, 1) for times in ts)

"""A diffrax solve, traced: what the forward and backward loops of an adjoint run on.

diffrax hands an adjoint its terms, solver, controller and first state. Here these become a few closed
functions of one lane (`closures`) and a record of arrays to start from, and nothing else: the loops of
`forward` and `backward` know no diffrax.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nde.solvers.adjoint.noise import Noise, noise_of, with_terms
from nde.solvers.adjoint.stepper import AbstractStepper
from nde.solvers.estimates.estimates import Judge, Judged
from nde.solvers.lanes.batch import Lanes
from nde.solvers.lanes.closures import ClosedFunction, Pool


class Start(NamedTuple):
    """Where the loop begins. Only `y` and `state` may carry a gradient."""

    y: PyTree[Array]
    state: PyTree[Array]
    made_jump: Array
    tprev: Array
    tnext: Array
    t1: Array
    controller_state: PyTree[Array]
    result: Array
    ts: tuple[Array, ...]  # one per `SubSaveAt` that is filled in the loop


class Outcome(NamedTuple):
    """What one attempt leads to, in one lane; the state is that of a step which is accepted."""

    accept: Array
    y: PyTree[Array]
    state: PyTree[Array]
    cache: PyTree[Array]
    made_jump: Array
    tprev: Array
    tnext: Array
    controller_state: PyTree[Array]
    result: Array
    dense_info: PyTree[Array]
    judged: Judged | None


@dataclass(frozen=True, eq=False)
class Save:
    """One `SubSaveAt`, as far as it is filled inside the loop.

    Rows are written in the order of time: after `offset` rows (the one at t0), save time i of a lane
    that has accepted k steps before goes to row `offset + i + k // every`.
    """

    rows: int
    offset: int
    times: int
    every: int  # every so many steps; 0: not
    at_time: ClosedFunction | None  # (t0, t1, dense_info, t) -> output
    at_step: ClosedFunction | None  # (t, y) -> output
    plain: bool  # y itself
    out: PyTree[jax.ShapeDtypeStruct]

    @property
    def is_linear(self) -> bool:
        """Whether outputs can be pulled back without knowing the state: y itself, at steps."""
        return self.at_time is None and self.plain

    def output_row(self, index: Array, accepted: Array) -> Array:
        """Where save time `index` goes after so many accepted steps."""
        return self.offset + index + (accepted // self.every if self.every else 0)


@dataclass(frozen=True, eq=False)
class Traced:
    """The closed functions of a solve, and what is known about it before any number is."""

    pool: Pool
    stepper: AbstractStepper | None  # for tracing, and for what is known of it beforehand
    memory: ClosedFunction | None  # t -> memory of the noise; None where no path remembers
    draw: ClosedFunction | None  # (t0, t1, memory) -> (increments, memory)
    attempt: ClosedFunction  # (y, state, cache, made_jump, tprev, tnext, t1, floor, controller) -> Outcome
    tick: ClosedFunction  # what the controller says of times; if `uniform`, whatever the state is
    advance: ClosedFunction  # (y, inner, t0, t1, made_jump) -> (y, inner, dense_info, judged)
    cache: ClosedFunction  # (t, y, state) -> cache
    saves: tuple[Save, ...]
    uniform: bool  # steps are never rejected: all lanes stand at the same step
    jumps: bool  # the field may jump between steps
    hands_over: bool  # the cache is part of the solution, and differentiated
    increments: PyTree[jax.ShapeDtypeStruct]  # of the remembering paths over one step
    knowing: Callable[[PyTree], AbstractStepper] | None  # the stepper, told those; for tracing only
    judged: Judged | None  # the dtypes of a step's estimates, if there are any

    def inner(self, state: PyTree[Array], cache: PyTree[Array]) -> PyTree[Array]:
        """What `advance` needs besides y, of what travels from step to step."""
        return (state, cache) if self.hands_over else state

    def bare(self) -> "Traced":
        """What the loops need: no arrays."""
        return dataclasses.replace(self, pool=Pool(), stepper=None, knowing=None)


class LaneFunctions(NamedTuple):
    """The functions of a traced solve in all lanes: arguments have a lane axis in front."""

    traced: Traced
    lanes: Lanes
    consts: list[Array]

    def __call__(self, fn: ClosedFunction, *args: PyTree[Array]) -> PyTree[Array]:
        """Evaluates one of them."""
        return self.lanes.per_lane(fn)(self.consts, *args)

    def memory(self, t0: Array) -> PyTree[Array]:
        """A memory of the noise."""
        return () if self.traced.memory is None else self(self.traced.memory, t0)

    def draw(self, t0: Array, t1: Array, memory: PyTree[Array]) -> tuple[PyTree, PyTree]:
        """The increments of the noise over a step, and the memory for the next."""
        return ((), memory) if self.traced.draw is None else self(self.traced.draw, t0, t1, memory)


@dataclass(frozen=True)
class _Steps:
    """One attempt, and one step of the solution, of one lane: what `trace` makes closed functions of."""

    stepper: AbstractStepper
    controller: diffrax.AbstractStepSizeController
    noise: Noise | None
    judge: Judge | None
    jumps: bool
    dense: bool  # outputs fall inside steps
    rounds: bool  # the end of a step may be moved to where the noise is found cheaply
    hands_over: bool

    def knowing(self, increments: PyTree) -> AbstractStepper:
        """The stepper, told the increments of the remembering paths."""
        if self.noise is None:
            return self.stepper
        return with_terms(self.stepper, self.noise.known(increments))

    def control(self, tprev, tnext, t1, floor, y, y1, y_error, controller_state):
        """What the controller says of a step from y to y1, and where the next one is to end."""
        order: Any = self.stepper.solver.error_order(self.stepper.terms)
        # Steps follow the solution, but their lengths carry no derivative of it.
        y, y1, y_error = jax.tree.map(jax.lax.stop_gradient, (y, y1, y_error))
        accept, t, t_end, jumped, controller_state, result = self.controller.adapt_step_size(
            tprev, tnext, y, y1, self.stepper.args, y_error, order, controller_state
        )
        t = jnp.minimum(t, t1)
        t_end = _clip_to_end(t, jnp.asarray(t_end), t1, floor, accept)
        if self.noise is not None and self.rounds:
            t_end = jnp.where(t_end == t1, t1, self.noise.round_end(t, t_end))
        return accept, t, t_end, jumped, controller_state, result

    def tick(self, y, tprev, tnext, t1, floor, controller_state):
        """The times of the next step, whether the field jumps before it, and the controller there."""
        times = (tprev, tnext, t1, floor)
        out = self.control(*times, y, y, y, controller_state)
        return out[1], out[2], jnp.asarray(out[3]), out[4]

    def attempt(
        self,
        y: PyTree[Array],
        state: PyTree[Array],
        cache: PyTree[Array],
        made_jump: Any,
        tprev: Array,
        tnext: Array,
        t1: Array,
        floor: Array,
        controller_state: PyTree[Array],
        increments: PyTree[Array],
    ) -> Outcome:
        """Tries a step; the controller says whether it is accepted, and what comes next."""
        made_jump = made_jump if self.jumps else False
        tried = self.knowing(increments).attempt(tprev, tnext, y, state, cache, made_jump)
        finite = all_finite(tried.y1)
        guess, y_error = _guarded(y, tried.y1, tried.y_error, finite)
        times = (tprev, tnext, t1, floor)
        accept, t, t_end, jumped, controller_state, result = self.control(
            *times, y, guess, y_error, controller_state
        )
        solver_result = diffrax.RESULTS.where(accept, tried.result, diffrax.RESULTS.successful)
        ok = solver_result == diffrax.RESULTS.successful
        result = diffrax.RESULTS.where(ok, result, solver_result)
        # An infinite or undefined state is never a solution, even where no error estimate objects.
        result = jnp.where(
            jnp.asarray(accept) & ~finite, code(diffrax.RESULTS.nonfinite), code(result)
        )
        judged = None
        if self.judge is not None:
            # Written as in the controller: the compiler sees one error norm where there are two.
            guess = jax.tree.map(lambda a, b: jnp.where(jnp.isnan(b).any(), a, b), y, guess)
            error = self.judge.in_units(y_error, y, guess)
            judged = self.judge(tprev, tnext, y, error, tried.ks)
        return Outcome(
            accept=jnp.asarray(accept) & finite,
            y=tried.y1,
            state=tried.state,
            cache=tried.cache,
            made_jump=jnp.asarray(jumped),
            tprev=t,
            tnext=t_end,
            controller_state=controller_state,
            result=result,
            dense_info=tried.dense_info if self.dense else None,
            judged=judged,
        )

    def advance(
        self,
        y: PyTree[Array],
        inner: PyTree[Array],
        t0: Array,
        t1: Array,
        made_jump: Any,
        increments: PyTree[Array],
    ):
        """The part of a step to differentiate."""
        state, cache = inner if self.hands_over else (inner, None)
        made_jump = made_jump if self.jumps else False
        with_error = self.dense or self.judge is not None
        stepper = self.knowing(increments)
        out = stepper.advance(t0, t1, y, state, made_jump, with_error, cache)
        judged = None
        if self.judge is not None:
            error = self.judge.in_units(out.y_error, y, out.y1)
            judged = self.judge(t0, t1, y, error, out.ks)
        inner = (out.state, out.cache) if self.hands_over else out.state
        return out.y1, inner, out.dense_info if self.dense else None, judged


def trace(
    stepper: AbstractStepper,
    controller: diffrax.AbstractStepSizeController,
    saveat: diffrax.SaveAt,
    init_state: Any,
    start: Start,
    fresh_jumps: bool,
    judge: Judge | None,
) -> Traced:
    """Traces a solve at the shapes of `start`."""
    uniform, jumps = _controller_habits(stepper, controller, start)
    jumps = jumps or fresh_jumps
    subs = inner_saves(saveat, init_state)
    dense = any(sub.ts is not None for sub, _ in subs)
    with_error = dense or judge is not None
    if uniform and not with_error:
        stepper = stepper.without_error()
    hands_over = with_error and not jumps and stepper.hands_over()
    tprev, tnext = start.tprev, start.tnext
    noise = noise_of(stepper, tprev, tnext, start.y, start.state)
    rounds = not uniform and not _must_hit(controller)
    steps = _Steps(stepper, controller, noise, judge, jumps, dense, rounds, hands_over)

    pool, memory, draw, increments = Pool(), None, None, ()
    if noise is not None:
        memory = pool.convert(lambda t: noise.init(), tprev)
        draw = pool.convert(noise.draw, tprev, tnext, memory.out)
        increments = draw.out[0]
    cache = pool.convert(stepper.cache, tprev, start.y, start.state)
    times = (tprev, tnext, start.t1, start.t1)
    at = (start.y, start.state, cache.out, start.made_jump, *times, start.controller_state)
    attempt = pool.convert(steps.attempt, *at, increments)
    inner = (start.state, cache.out) if hands_over else start.state
    advance = pool.convert(steps.advance, start.y, inner, tprev, tnext, start.made_jump, increments)
    tick = ft.partial(steps.tick, jax.tree.map(jnp.zeros_like, start.y))  # any state
    tick = pool.convert(tick, *times, start.controller_state)
    *_, info, judged = advance.out
    saves = tuple(_trace_save(pool, stepper, sub, saved, start, info) for sub, saved in subs)
    return Traced(
        pool=pool,
        stepper=stepper,
        memory=memory,
        draw=draw,
        attempt=attempt,
        tick=tick,
        advance=advance,
        cache=cache,
        saves=saves,
        uniform=uniform,
        jumps=jumps,
        hands_over=hands_over,
        increments=increments,
        knowing=steps.knowing,
        judged=judged,
    )


def code(result: Any) -> Array:
    """A `diffrax.RESULTS` as an array."""
    return jnp.asarray(jax.tree.leaves(result)[0])


def from_code(result: Array) -> Any:
    """An array as a `diffrax.RESULTS`."""
    return jax.tree.unflatten(jax.tree.structure(diffrax.RESULTS.successful), [result])


def _is_sub(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def saves(saveat: diffrax.SaveAt, state: Any) -> list[tuple[diffrax.SubSaveAt, Any]]:
    """Every `SubSaveAt` with its output buffers in diffrax's state."""
    subs, tree = jax.tree.flatten(saveat.subs, is_leaf=_is_sub)
    return list(zip(subs, tree.flatten_up_to(state.save_state), strict=True))


def is_inner(sub: diffrax.SubSaveAt) -> bool:
    """Whether outputs fall inside the loop; those at t0 and t1 are made around it."""
    return sub.ts is not None or sub.steps != 0


def inner_saves(saveat: diffrax.SaveAt, state: Any) -> list[tuple[diffrax.SubSaveAt, Any]]:
    """Those that the loop fills."""
    return [(sub, saved) for sub, saved in saves(saveat, state) if is_inner(sub)]


def _trace_save(pool: Pool, stepper, sub, saved, start: Start, info) -> Save:
    output = lambda t, y: sub.fn(t, y, stepper.args)
    evaluate = lambda t0, t1, info, t: output(
        t, stepper.solver.interpolation_cls(t0=t0, t1=t1, **info).evaluate(t)
    )
    at_time = None
    if sub.ts is not None:
        at_time = pool.convert(evaluate, start.tprev, start.tnext, info, start.t1)
    at_end = (pool if sub.steps else Pool()).convert(output, start.tprev, start.y)
    return Save(
        rows=saved.ts.shape[0],
        offset=int(sub.t0),
        times=0 if sub.ts is None else len(sub.ts),
        every=int(sub.steps),
        at_time=at_time,
        at_step=at_end if sub.steps else None,
        plain=not at_end.computes,
        out=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), saved.ys),
    )


def _controller_habits(stepper, controller, start: Start) -> tuple[bool, bool]:
    """Whether the controller never rejects a step, looking at times alone; and whether it can announce
    a jump."""
    habits = []

    def adapt(y: PyTree[Array], t0: Array, t1: Array, controller_state: PyTree[Array]):
        accept, *times, made_jump, controller_state, _ = controller.adapt_step_size(
            t0, t1, y, y, stepper.args, y, 1.0, controller_state
        )
        habits.append((accept is True, made_jump is not False))
        return *times, made_jump, controller_state

    adapted = Pool().convert(adapt, start.y, start.tprev, start.tnext, start.controller_state)
    always, jumps = habits[0]
    looks = adapted.reads & set(range(len(jax.tree.leaves(start.y))))
    return always and not looks, jumps


def _must_hit(controller: diffrax.AbstractStepSizeController) -> bool:
    """Whether the controller aims at times that its steps must meet."""
    is_clip = lambda x: isinstance(x, diffrax.ClipStepSizeController)
    clips = [x for x in jax.tree.leaves(controller, is_leaf=is_clip) if is_clip(x)]
    aims = lambda clip: clip.step_ts is not None or clip.jump_ts is not None
    return any(aims(clip) or _must_hit(clip.controller) for clip in clips)


def all_finite(y: PyTree[Array]) -> Array:
    """Whether every number is."""
    finite = jnp.array(True)
    for x in jax.tree.leaves(y):
        finite &= jnp.all(jnp.isfinite(x))
    return finite


def _guarded(y0, y1, y_error, finite):
    """The candidate and its error as a controller can use them.

    A trial state that overflows would make the next step size NaN; an infinite error makes it small.
    """
    if y_error is None:
        return y1, None
    finite &= all_finite(y_error)
    guess = jax.tree.map(lambda a, b: jnp.where(finite, a, b), y1, y0)
    return guess, jax.tree.map(lambda e: jnp.where(finite, e, np.inf), y_error)


def end_floor(t1: Array) -> Array:
    """About 100 spacings before t1: a step that ends beyond it ends on t1 (as in diffrax)."""
    t1 = jax.lax.stop_gradient(t1)
    return t1 - 100 * (t1 - jnp.nextafter(t1, jnp.full_like(t1, -jnp.inf)))


def _clip_to_end(tprev: Array, tnext: Array, t1: Array, floor: Array, accept) -> Array:
    """Never stops just short of t1: there an accepted step ends on t1, a retried one half-way."""
    half = tprev + 0.5 * (t1 - tprev)
    end = jnp.where(jnp.asarray(accept) | (half <= tprev), t1, half)
    return jnp.where(tnext > floor, end, tnext)

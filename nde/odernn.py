r"""Recurrent networks in continuous time: a state that flows between observations and jumps at them.

    h(t_1) = h_0
    dh/dt = f(t, h)                             from each time to the next
    p_i = l(h(t_i-))                            what is predicted of x_i
    h(t_i+) = J(h(t_i-), x_i, o_i, p_i)         where anything was observed; o_i says which channels

f and J may be anything, which makes one recurrence of three models:

    ODE-RNN           f a network, J a GRU or an LSTM                              `Cell`
    GRU-ODE-Bayes     f = (1 - z(h)) (g(h) - h), a GRU in continuous time (`nde.fields.GRUField`),
                      J a GRU that sees how wrong the prediction was               `BayesCell`
    neural jump ODE   f a network, J a learned map of state and observation        `Reset`

Each gap is solved in unit time, dh/ds = (t_i - t_(i-1)) f. A gap of length zero is the identity, to the
last bit, a gap may be negative, and no two times are too close for the precision of their sum.

The default takes equal steps in each gap. They are part of the model: see by more of them, or by
adaptive ones (`steps_per_interval=None`), whether it still does the same.

In code:    f -> vector_field, J -> jump, l -> readout, h_0 -> start, o -> seen
Not for:    forecasts far beyond the data: nothing has trained the flow there. `nde.LatentODE` is.
Reference:  Latent ODEs for irregularly-sampled time series (2019) | arXiv:1907.03907
            GRU-ODE-Bayes: continuous modeling of sporadically-observed time series (2019)
            | arXiv:1905.12374
            Neural jump stochastic differential equations (2019) | arXiv:1905.10403
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from nde._inputs import (
    check_callable,
    check_key,
    check_state,
    check_times,
    check_vector_field,
)
from nde._latent import Series, check_forwards, check_series, check_values
from nde._model import AbstractModel
from nde._solve import Rates, Stepping, in_one_precision, solve
from nde._steps import KnotSteps
from nde._times import check_spacing
from nde.solvers import SolveError
from nde.solvers.adjoint.traced import code
from nde.solvers.inputs import check_count, is_traced

__all__ = ["Backwards", "BayesCell", "Cell", "Crossings", "ODERNN", "OfHidden", "Reset"]

State = PyTree[Float[Array, "..."]]
# What is counted in the gaps, and added up.
COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps", "nfe")


class Crossings(NamedTuple):
    """The states at the times of a series.

    Attributes:
        before: What the flow has brought, shape (times, ...) for every leaf of the state.
        after: The same after the jump.
        prediction: The readout of `before`: it knows nothing of the observations at its time or later.
    """

    before: State
    after: State
    prediction: PyTree[Array]


class ODERNN(AbstractModel):
    """One series in, a prediction of every observation from those before it out; `jax.vmap` is the batch.
    See the module for the equations.

    Args:
        vector_field: `vector_field(t, h, args) -> dh`, shaped like the state: `nde.fields.MLPField`,
            `nde.fields.GRUField`.
        jump: `jump(h, x, seen, prediction) -> h`, with x of shape (channels,), zero where `seen`, of the
            same shape, is False: `Cell`, `BayesCell`, `Reset`.
        readout: `readout(h) -> prediction`, of any shape.
        start: State at the first time, an array or a PyTree of arrays; trained.
        steps_per_interval: Steps of equal length from each time to the next; `None` leaves the steps to
            `stepsize_controller`.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long adaptive steps are, for `steps_per_interval=None`.
        adjoint: How gradients are taken.
        dt0: First adaptive step, in the unit of the times, positive.
        max_steps: Largest number of attempted adaptive steps from each time to the next.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for a series that cannot be
            used.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> model = nde.ODERNN(
        ...     nde.fields.MLPField(16, 32, 1, key=keys[0]),
        ...     nde.odernn.Cell(eqx.nn.GRUCell(2 * channels, 16, key=keys[1])),
        ...     eqx.nn.Linear(16, channels, key=keys[2]),
        ...     jnp.zeros(16),
        ... )
        >>> predictions = model(ts, ys)                 # (times,), (times, channels) -> the same
        >>> further = model.forecast(ts, ys, future)    # (future times, channels)
    """

    vector_field: Callable
    jump: Callable
    readout: Callable
    start: State
    steps_per_interval: int | None = eqx.field(default=1, kw_only=True, static=True)
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Heun(), kw_only=True)

    def __check_init__(self):
        check_callable("vector_field", self.vector_field, "(t, h, args)")
        check_callable("jump", self.jump, "(h, x, seen, prediction)")
        check_callable("readout", self.readout, "(h)")
        if self.steps_per_interval is not None:
            hint = ", or None to let `stepsize_controller` choose the steps"
            check_count("steps_per_interval", self.steps_per_interval, hint)
        if self.dt0 is not None and not is_traced(self.dt0) and self.dt0 < 0:
            raise ValueError(f"`dt0` is {self.dt0}; it is positive, in both directions of time.")

    def __call__(
        self, ts: Float[Array, " times"], ys: Series, args: PyTree[Any] = None
    ) -> PyTree[Array]:
        """What is predicted of each observation from those before it, shape (times, ...)."""
        return self._crossings(ts, ys, args).prediction

    def solve(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        args: PyTree[Any] = None,
        *,
        throw: bool = True,
    ) -> diffrax.Solution:
        """The same solves with their `.stats`, added up, and `.result`; `.ys` are `Crossings`.

        The output of a series as a whole is `model.readout` of the last state, `.ys.after[-1]`; padding
        does not change it.

        Args:
            ts: Times, shape (times,), increasing; they may repeat, the last as padding.
            ys: Observations, shape (times, channels); NaN where there is none.
            args: Passed to the vector field.
            throw: Whether a failed solve raises. If not, look at `.result`, the first failure: from there
                on the states mean nothing.

        Raises:
            ValueError: if `ts`, `ys` or what the vector field returns cannot be used.
            nde.solvers.SolveError: with `throw`, if a solve fails; inside `jax.jit` and other
                transformations a RuntimeError.
        """
        check_times(ts)
        check_forwards(ts)
        check_series(ts, ys)
        return solve_gaps(self, self.start, ts[0], ts, ys, args, throw=throw)

    def forecast(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        future: Float[Array, " future"],
        args: PyTree[Any] = None,
    ) -> PyTree[Array]:
        """The outputs at times after the series, shape (future, ...): the flow alone.

        Args:
            ts: Times of the series, as for `solve`.
            ys: Observations.
            future: Times, shape (future,), increasing, none before `ts[-1]`.
            args: Passed to the vector field.
        """
        check_times(future)
        last = jax.tree.map(lambda h: h[-1], self._crossings(ts, ys, args).after)
        nothing = jnp.full((future.shape[0], ys.shape[1]), jnp.nan, ys.dtype)
        return self._from(last, ts[-1], future, nothing, args).prediction

    def continue_from(
        self,
        h: State,
        t0: Float[Array, ""],
        ts: Float[Array, " times"],
        ys: Series,
        args: PyTree[Any] = None,
    ) -> State:
        """The state after further observations at `ts`, from the state `h` at `t0`.

        For a series that arrives while it is used: `h = model.start` at the first time, then one call per
        observation, `model.continue_from(h, t0, t[None], x[None])`; NaN for x only lets time pass.
        """
        return jax.tree.map(lambda h: h[-1], self._from(h, t0, ts, ys, args).after)

    def _from(self, h, t0, ts, ys, args) -> Crossings:
        check_times(ts)
        check_forwards(ts)
        if not is_traced(t0, ts) and np.asarray(ts)[0] < np.asarray(t0):
            raise ValueError(
                f"The times begin at {ts[0]}, before the state, at {t0}; time runs forwards."
            )
        return solve_gaps(self, h, t0, ts, ys, args, throw=True).ys  # pyright: ignore[reportReturnType]

    def _crossings(self, ts, ys, args) -> Crossings:
        return self.solve(ts, ys, args).ys  # pyright: ignore[reportReturnType]


class Backwards(eqx.Module):
    """An `ODERNN` that runs from the end of a series to its beginning, as an encoder of
    `nde.LatentODE` and `nde.LatentSDE`.

    The context of a time knows the observations from there on; the state starts at the last one. It is
    NaN if a solve fails.

    Args:
        model: An `ODERNN`; its `readout` makes contexts, shape (context,).
    """

    model: ODERNN

    def __call__(self, ts: Float[Array, " times"], ys: Series) -> Float[Array, "times context"]:
        """The contexts of a series, NaN where it is missing."""
        seen = jnp.any(~jnp.isnan(ys), axis=1)
        ts = jnp.minimum(ts, jnp.max(jnp.where(seen, ts, ts[0])))
        reverse = lambda x: x[::-1]
        solution: Any = solve_gaps(
            self.model, self.model.start, ts[-1], reverse(ts), reverse(ys), None, throw=False
        )
        contexts = reverse(jax.vmap(self.model.readout)(solution.ys.after))
        return jnp.where(diffrax.is_okay(solution.result), contexts, jnp.nan)


class OfHidden(eqx.Module):
    """The field of an LSTM's state (h, c): h flows, and the memory c waits.

    Args:
        field: `field(t, h, args) -> dh`.
    """

    field: Callable

    def __call__(self, t: Array, state: tuple[Array, Array], args: PyTree[Any]) -> State:
        """The rates of both."""
        return self.field(t, state[0], args), jnp.zeros_like(state[1])


class Cell(eqx.Module):
    """A recurrent cell as a jump; it sees the observation, zero where there is none, and which channels
    were observed.

    Args:
        cell: `cell(inputs, h) -> h`, inputs of shape (2 channels,): `eqx.nn.GRUCell`, or
            `eqx.nn.LSTMCell`, whose state is a pair.
    """

    cell: Callable

    def __call__(
        self,
        h: State,
        x: Float[Array, " channels"],
        seen: Bool[Array, " channels"],
        prediction: Any,
    ) -> State:
        """The state after the observation."""
        return self.cell(jnp.concatenate([x, seen.astype(x.dtype)]), h)


class Reset(eqx.Module):
    """A learned map of state and observation as a jump: the state is set to what it gives.

    Args:
        network: `network(inputs) -> h`, inputs of shape (hidden + 2 channels,): the state, the
            observation, and which channels were observed.
    """

    network: Callable

    def __call__(
        self,
        h: Float[Array, " hidden"],
        x: Float[Array, " channels"],
        seen: Bool[Array, " channels"],
        prediction: Any,
    ) -> Float[Array, " hidden"]:
        """The state after the observation."""
        return self.network(jnp.concatenate([h, x, seen.astype(x.dtype)]))


class BayesCell(eqx.Module):
    """The jump of GRU-ODE-Bayes: a GRU that sees, of every observed channel, the value x, the
    predicted mean m and log standard deviation log s, and the error (x - m) / s.

    The prediction is (m, log s), shape (2 channels,); the loss is `nde.losses.prediction_likelihood`.

    Args:
        channels: Of the series.
        hidden: Size of the state.
        width: Units for each channel.
        key: Of the initial weights.
    """

    weights: Float[Array, "channels width 4"]
    bias: Float[Array, "channels width"]
    cell: eqx.nn.GRUCell

    def __init__(self, channels: int, hidden: int, width: int, *, key: PRNGKeyArray):
        check_key(key)
        for name, count in (("channels", channels), ("hidden", hidden), ("width", width)):
            check_count(name, count)
        key_weights, key_cell = jax.random.split(key)
        self.weights = jax.random.normal(key_weights, (channels, width, 4)) / 2
        self.bias = jnp.full((channels, width), 0.1)
        self.cell = eqx.nn.GRUCell(channels * width, hidden, key=key_cell)

    def __call__(
        self,
        h: Float[Array, " hidden"],
        x: Float[Array, " channels"],
        seen: Bool[Array, " channels"],
        prediction: Float[Array, " 2*channels"],
    ) -> Float[Array, " hidden"]:
        """The state after the observation."""
        if jnp.shape(prediction) != (2 * x.shape[0],):
            raise ValueError(
                f"`readout` returned shape {jnp.shape(prediction)} for {x.shape[0]} channels; a "
                "BayesCell needs mean and log standard deviation of each, shape (2 channels,)."
            )
        mean, log_std = jnp.split(prediction, 2)
        told = jnp.stack([x, mean, log_std, (x - mean) * jnp.exp(-log_std)], axis=1)
        units = jax.nn.relu(jnp.einsum("cwi,ci->cw", self.weights, told) + self.bias)
        return self.cell(jnp.where(seen[:, None], units, 0).reshape(-1), h)


def solve_gaps(
    model: ODERNN,
    h: State,
    t0: Float[Array, ""],
    ts: Float[Array, " times"],
    ys: Series,
    args: PyTree[Any],
    *,
    throw: bool,
) -> diffrax.Solution:
    """From the state `h` at `t0` through the rows of a series, in the order in which they stand."""
    check_times(ts)
    check_spacing("ts", ts)
    check_values(ts, ys)
    check_state(h)
    h, t0, ts, ys = in_one_precision(h, t0, ts, ys)
    check_vector_field(model.vector_field, t0, h, args)
    _check_jump(model, h, ys[0])
    crossings, result, stats = _cross(model, h, t0, ts, ys, args)
    if throw and is_traced(result):
        crossings = result.error_if(crossings, ~diffrax.is_okay(result))
    elif throw and int(code(result)):
        _raise_failure(model, h, t0, ts, ys, args)
    return diffrax.Solution(
        t0=t0,
        t1=ts[-1],
        ts=ts,
        ys=crossings,
        interpolation=None,
        stats=stats,
        result=result,
        solver_state=None,
        controller_state=None,
        made_jump=None,
        event_mask=None,
    )


@eqx.filter_jit
def _cross(
    model: ODERNN, h: State, t0: Array, ts: Array, ys: Series, args: PyTree[Any]
) -> tuple[Crossings, diffrax.RESULTS, dict[str, Array]]:
    """The states at all times, the first failure, and what the solves took together."""

    def row(carry: Any, now: Any):
        h, t, result = carry
        t_next, y = now
        solution = _flow(model, h, t, t_next, args, throw=False)
        okay = diffrax.is_okay(solution.result)
        # The cotangent of a state that is not finite would be nan, even of one that does not count.
        reached = jax.tree.map(lambda h, end: jnp.where(okay, end[-1], h), h, solution.ys)
        prediction, after = _jump(model, reached, y)
        result = diffrax.RESULTS.where(diffrax.is_okay(result), solution.result, result)
        counts = {name: solution.stats[name] for name in COUNTS if name in solution.stats}
        return (after, t_next, result), (Crossings(reached, after, prediction), counts)

    start = (h, t0, diffrax.RESULTS.successful)
    (_, _, result), (crossings, counts) = jax.lax.scan(row, start, (ts, ys))
    return crossings, result, jax.tree.map(jnp.sum, counts)


def _jump(model: ODERNN, h: State, y: Float[Array, " channels"]) -> tuple[PyTree[Array], State]:
    """The prediction, and the state after what was observed, if anything was."""
    prediction, jumped = _told(model, h, y)
    here = jnp.any(~jnp.isnan(y))
    return prediction, jax.tree.map(lambda a, b: jnp.where(here, a.astype(b.dtype), b), jumped, h)


def _told(model: ODERNN, h: State, y: Float[Array, " channels"]) -> tuple[PyTree[Array], State]:
    """The prediction, and what the jump makes of the state."""
    seen = ~jnp.isnan(y)
    prediction = model.readout(h)
    return prediction, model.jump(h, jnp.where(seen, y, 0), seen, prediction)


def _flow(
    model: ODERNN, h: State, t0: Array, t1: Array, args: PyTree[Any], *, throw: bool
) -> diffrax.Solution:
    """One gap, in unit time."""
    gap = t1 - t0
    unit = jnp.arange(2, dtype=gap.dtype)
    if model.steps_per_interval is None:
        dt0 = model.dt0
        if dt0 is not None:
            share = dt0 / jnp.where(gap == 0, 1, jnp.abs(gap))
            dt0 = jnp.minimum(share, 1).astype(gap.dtype)
        stepping = Stepping(model.stepsize_controller, dt0, model.max_steps)
    else:
        steps = model.steps_per_interval
        stepping = Stepping(KnotSteps(unit, steps), None, steps)
    return solve(
        model,
        diffrax.ODETerm(Rates(_InUnitTime(model.vector_field, t0, gap))),
        h,
        t0=unit[0],
        t1=unit[1],
        saveat=diffrax.SubSaveAt(t1=True),
        args=args,
        stepping=stepping,
        throw=throw,
    )


class _InUnitTime(eqx.Module):
    """dh/ds = gap f(t0 + s gap, h)."""

    vector_field: Callable
    t0: Array
    gap: Array

    def __call__(self, s: Array, h: State, args: PyTree[Any]) -> State:
        rates = self.vector_field(self.t0 + s * self.gap, h, args)
        return jax.tree.map(lambda rate: self.gap.astype(rate.dtype) * rate, rates)


def _raise_failure(
    model: ODERNN, h: State, t0: Array, ts: Array, ys: Series, args: PyTree[Any]
) -> None:
    """Takes the gaps one by one to the one that fails, for its reason."""
    for i, (t, y) in enumerate(zip(ts, ys, strict=True)):
        try:
            solution = _flow(model, h, t0, t, args, throw=True)
        except SolveError as error:
            message = f"Before ts[{i}]={t}, in units of a gap of {t - t0}: {error}"
            known = {k: getattr(error, k) for k in ("cause", "t", "leaf", "steps", "advice")}
            raise SolveError(message, **known) from None
        reached = jax.tree.map(lambda end: end[-1], solution.ys)
        h, t0 = _jump(model, reached, y)[1], t


def _check_jump(model: ODERNN, h: State, y: Array) -> None:
    """`jump` gives a state like the one it is given."""
    try:
        _, after = eqx.filter_eval_shape(_told, model, h, y)
    except (TypeError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(
            f"`readout` and `jump` cannot be applied to `start` = {eqx.tree_pformat(h)} and an "
            f"observation of shape {y.shape}: {told}"
        ) from error
    shapes = [jax.tree.map(jnp.shape, state) for state in (after, h)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`jump` returned a state of shape {shapes[0]} but `start` has {shapes[1]}; it returns the "
            "state after the observation."
        )

"""From data to fronts: what is checked before an evolution, what is seen during it, when it ends."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from nde.solvers.inputs import check_count
from nde.symbolic.evolution import Data, Settings, State, advance, start
from nde.symbolic.expression import from_tape
from nde.symbolic.front import Front, make_front
from nde.symbolic.operators import OPERATORS, check_operators
from nde.symbolic.tape import Language
from nde.symbolic.units import Units

__all__ = ["distill", "search", "slopes"]

FEWEST = 8  # points
CHUNK = 5  # generations between two looks at the clock


def search(
    inputs: Float[ArrayLike, "points variables"],
    targets: Float[ArrayLike, "points outputs"],
    *,
    variables: Sequence[str],
    operators: Sequence[str] = ("+", "-", "*", "/"),
    length: int = 16,
    units: Units | Sequence[Units] | None = None,
    generations: int = 100,
    seconds: float | None = None,
    tolerance: float = 0.0,
    islands: int = 16,
    population: int = 64,
    births: int = 32,
    tournament: int = 8,
    constant_steps: int = 3,
    parsimony: float = 0.0,
    progress: bool = True,
    key: PRNGKeyArray,
) -> tuple[Front, ...]:
    """Formulas for each column of `targets` as functions of the columns of `inputs`.

    A known part of a target is fixed by subtracting it beforehand. A few hundred points are enough; allow
    64 bits (`jax.config.update("jax_enable_x64", True)`) for constants of more than a few digits. The
    same key gives the same fronts, unless `seconds` ends the search.

    Args:
        inputs: Shape (points, variables).
        targets: Shape (points, outputs).
        variables: A name for every column of `inputs`.
        operators: What formulas may use, out of `nde.symbolic.OPERATORS`. Every one of them costs, used
            or not.
        length: Most tokens of a formula.
        units: `Units` that the formulas must agree with; a sequence for one each per output.
        generations: Largest number of generations per output.
        seconds: Time after which no more are begun, for all outputs together; None for no limit.
        tolerance: A relative loss at which the search of an output ends.
        islands: Number of islands.
        population: Expressions on each.
        births: How many of them are replaced in a generation.
        tournament: How many of them compete to be a parent.
        constant_steps: Levenberg-Marquardt steps for the constants of every child.
        parsimony: Loss, in logarithm, that a token has to be worth.
        progress: Whether to print a line now and then.
        key: Of all that is random.

    Returns:
        One `Front` per output.

    Raises:
        ValueError: for data that are too few, constant or not finite, a budget of zero, operators that no
            variable allows, and units that nothing was found to agree with.
    """
    operators, variables = check_operators(operators), tuple(variables)
    x, y = checked_data(inputs, targets, variables)
    _check_applicable(operators, x)
    counts = {"length": length, "generations": generations, "islands": islands, "births": births}
    for name, count in (counts | {"population": population, "tournament": tournament}).items():
        check_count(name, count)
    check_count("constant_steps", constant_steps, least=0)
    if births > population:
        raise ValueError(f"`births` is {births}, more than the `population` of {population}.")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`seconds` is {seconds}; a search needs some time, or None for no limit.")
    units = [units] * len(y) if units is None or isinstance(units, Units) else list(units)
    if len(units) != len(y):
        raise ValueError(
            f"`units` has {len(units)} entries; give one for each of {len(y)} outputs."
        )
    language = Language(variables, operators, length)
    fronts = []
    for number, (target, unit) in enumerate(zip(y, units, strict=True)):
        if unit is not None:
            unit.of(variables)
        settings = Settings(
            language, islands, population, births, tournament, constant_steps, parsimony, unit
        )
        data = (jnp.asarray(x), jnp.asarray(target))
        limit = None if seconds is None else seconds / len(y)
        state = _evolve(
            settings,
            data,
            jax.random.fold_in(key, number),
            generations,
            limit,
            tolerance,
            f"output {number + 1} of {len(y)}" if progress else None,
        )
        fronts.append(_front(language, state, float(np.var(target))))
    return tuple(fronts)


def distill(
    model: Any,
    states: Float[ArrayLike, "points channels"],
    *,
    t: float = 0.0,
    args: Any = None,
    by: Callable[..., tuple[Front, ...]] = search,
    **options: Any,
) -> tuple[Front, ...]:
    """Formulas for what a network has learned: of a `HybridODE` its network term, of other models the
    vector field.

    Args:
        model: A model, or a field `(t, y, args)`.
        states: Where to look, shape (points, channels): states of the data, say. A network means nothing
            where it has seen no data.
        t: The time at which to look.
        args: Passed to the field.
        by: `search`, or `sparse` for sums of terms of a library.
        options: Of it.

    Returns:
        One `Front` per output of the field.
    """
    network = getattr(model, "network", None)
    field: Callable = getattr(model, "vector_field", model) if network is None else network
    states = jnp.asarray(states)
    now = jnp.asarray(t, states.dtype)
    targets = eqx.filter_jit(jax.vmap(lambda y: field(now, y, args)))(states)
    return by(states, targets, **options)


def slopes(
    ts: Float[ArrayLike, " times"],
    ys: Float[ArrayLike, "*series times channels"],
    *,
    window: int = 7,
    degree: int = 4,
) -> tuple[Float[np.ndarray, "points channels"], Float[np.ndarray, "points channels"]]:
    """States and their rates of change along trajectories: the data of `search` without a network.

    At each time a polynomial is fitted to the nearest `window` observations. With noise, more of them.

    Args:
        ts: Times, shape (times,), the same for all series.
        ys: States, shape (series, times, channels) or (times, channels).
        window: Observations for each fit.
        degree: Of the polynomial.

    Raises:
        ValueError: for a window that is longer than the series, or too short for the degree.
    """
    ts, ys = np.asarray(ts, float), np.asarray(ys, float)
    if not degree < window <= ts.size or degree < 1:
        raise ValueError(
            f"`window` is {window} and `degree` {degree}, of {ts.size} times; it is longer than the degree "
            "and not longer than the series."
        )
    series = ys.reshape(-1, *ys.shape[-2:])
    states, rates = np.empty_like(series), np.empty_like(series)
    for at, t in enumerate(ts):
        first = np.clip(at - window // 2, 0, ts.size - window)
        near = slice(first, first + window)
        unit = np.ptp(ts[near])
        powers = np.vander((ts[near] - t) / unit, degree + 1, increasing=True)
        weights = np.linalg.pinv(powers)[:2]  # the value and the slope at t
        fitted = np.einsum("pw,swc->psc", weights, series[:, near])
        states[:, at], rates[:, at] = fitted[0], fitted[1] / unit
    flat = lambda x: x.reshape(-1, ys.shape[-1])
    return flat(states), flat(rates)


def _evolve(
    settings: Settings,
    data: Data,
    key: PRNGKeyArray,
    generations: int,
    seconds: float | None,
    tolerance: float,
    title: str | None,
) -> State:
    began, spread = time.perf_counter(), float(jnp.var(data[1]))
    state = start(settings, data, jax.random.fold_in(key, 0))
    done, shown = 0, began
    while done < generations:
        chunk = min(CHUNK, generations - done)
        state = advance(settings, state, data, jax.random.fold_in(key, 1), chunk)
        done += chunk
        best, now = float(jnp.min(state.hall.loss)) / spread, time.perf_counter()
        ends = best <= tolerance or (seconds is not None and now - began > seconds)
        if title is not None and (now - shown > 5 or ends or done == generations):
            shown = now
            size = int(jnp.argmin(state.hall.loss))
            print(
                f"{title}: generation {done}, {now - began:.0f} s, loss {best:.1e} with {size} tokens"
            )
        if ends:
            break
    return state


def _front(language: Language, state: State, spread: float) -> Front:
    hall = jax.tree.map(np.asarray, state.hall)
    found = np.flatnonzero(np.isfinite(hall.loss))
    if not found.size:
        raise ValueError(
            "No formula was found that is finite on the data and agrees with `units`; allow other "
            "`operators`, a greater `length`, or more `generations`."
        )
    tapes = [(hall.tape.codes[at], hall.tape.constants[at]) for at in found]
    expressions = [from_tape(language, *tape) for tape in tapes]
    return make_front(expressions, hall.loss[found] / spread)


def checked_data(inputs: Any, targets: Any, variables: tuple[str, ...]) -> tuple[Array, Array]:
    """`inputs` and `targets` with the points last."""
    x, y = np.asarray(inputs), np.asarray(targets)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"`inputs` has shape {x.shape} and `targets` {y.shape}; they are (points, variables) and "
            "(points, outputs): for one output targets[:, None]."
        )
    if len(variables) != x.shape[1] or len(set(variables)) < len(variables):
        raise ValueError(
            f"`variables` is {variables}; give {x.shape[1]} different names, one per column of `inputs`."
        )
    bad = [name for name in variables if not name.isidentifier() or name in OPERATORS]
    if bad:
        raise ValueError(f"`variables` has {bad}; a name is an identifier and no operator.")
    if len(x) < FEWEST:
        raise ValueError(f"`inputs` has {len(x)} points; a formula needs {FEWEST} or more.")
    for name, value in (("inputs", x), ("targets", y)):
        if not np.isfinite(value).all():
            at = tuple(map(int, np.argwhere(~np.isfinite(value))[0]))
            raise ValueError(f"`{name}` is {value[at]} at index {at}; data must be finite.")
    dtype = jnp.promote_types(jnp.result_type(x), jnp.result_type(y))
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    x, y = x.T.astype(dtype), y.T.astype(dtype)
    flat = np.flatnonzero(np.ptp(y, axis=1) <= 8 * np.finfo(dtype).eps * np.abs(y).max(axis=1))
    if flat.size:
        at = int(flat[0])
        raise ValueError(
            f"`targets` is constant in column {at} ({y[at, 0]:.6g}): that is its formula."
        )
    return x, y


def _check_applicable(operators: tuple[str, ...], x: Array) -> None:
    """Without an operator of two arguments, one of the others must be finite on a variable."""
    table = [OPERATORS[name] for name in operators]
    if any(operator.arity == 2 for operator in table):
        return
    fine = any(np.isfinite(operator.function(row)).all() for operator in table for row in x)
    if not fine:
        raise ValueError(
            f"`operators` {operators} are not finite on any of the `inputs`; allow others."
        )

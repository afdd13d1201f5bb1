r"""Through the solve: constants and losses of formulas as parts of a model, on observed trajectories.

Regression on a field is cheap, and passes on the errors of the field. So the formulas of the fronts that
survive it are put into the equation, and their constants fitted again to what was observed:

    min over c of  sum_ijk ((Y(t_j; y0_i, c) - y_ijk) / scale_k)^2 / n,      Y by the solve of the model

by Levenberg-Marquardt, with derivatives in forward mode: there are few constants. Candidates are tapes, so
that one compiled program serves all of them.

In code:    i -> series, j -> times, k -> channels; NaN in y is not observed; scale -> the std
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from nde.solvers.inputs import check_count
from nde.symbolic.constants import SLOTS
from nde.symbolic.expression import Expression, Field, from_tape, to_tape
from nde.symbolic.front import WORTH, Front, last_worth
from nde.symbolic.tape import CONSTANT, Language, evaluate

__all__ = ["Refined", "refine"]


class Refined(NamedTuple):
    """Fields of formulas, from simple to complex, with what they are worth in the model.

    Args:
        fields: One per candidate.
        losses: Mean square of the misfits in units of the standard deviation of each channel.
        make_model: As given to `refine`.
    """

    fields: tuple[Field, ...]
    losses: np.ndarray
    make_model: Callable

    @property
    def complexities(self) -> np.ndarray:
        """Tokens of all formulas together."""
        return np.array([sum(e.complexity for e in field.expressions) for field in self.fields])

    def choose(self, *, noise: float | None = None, worth: float = WORTH) -> Field:
        """One of the fields, by the rules of `Front.choose`."""
        if noise is not None:
            good = np.flatnonzero(self.losses <= noise)
            return self.fields[good[0] if good.size else int(np.argmin(self.losses))]
        return self.fields[last_worth(self.complexities, self.losses, worth)]

    def model(self, **options: Any) -> Any:
        """The model of the chosen field; `options` of `choose`. It solves, trains and saves."""
        return self.make_model(self.choose(**options))

    def table(self) -> str:
        """Complexity, loss and formulas, a line each; the chosen one is marked."""
        chosen = self.choose()
        lines = [f"{'size':>5} {'loss':>9}"]
        for field, loss, size in zip(self.fields, self.losses, self.complexities, strict=True):
            mark = "<-" if field is chosen else "  "
            text = ";  ".join(map(_rounded, field.expressions))
            lines.append(f"{size:>5} {loss:>9.2e} {mark} {text}")
        return "\n".join(lines)


def refine(
    fronts: Sequence[Front],
    make_model: Callable[[Callable], Any],
    ts: Float[ArrayLike, " times"],
    y0s: Float[ArrayLike, "series channels"],
    ys: Float[ArrayLike, "series times channels"],
    *,
    args: PyTree[Any] = None,
    candidates: int = 12,
    steps: int = 20,
) -> Refined:
    """Fit the constants of the best formulas through the solve.

    Args:
        fronts: One per output of the field.
        make_model: `make_model(field) -> model`: `nde.NeuralODE`, or, with a known part, `lambda field:
            nde.HybridODE(known, field, parameters)`.
        ts: Times, shape (times,).
        y0s: Initial states, shape (series, channels).
        ys: Observed states, shape (series, times, channels); NaN marks what was not observed.
        args: Passed to the field.
        candidates: How many combinations of formulas are tried, the simplest of the joint front.
        steps: Largest number of Levenberg-Marquardt steps for each.

    Returns:
        The candidates with a finite loss, and their losses.

    Raises:
        ValueError: for a count below 1, data of another shape, or if no candidate can be solved.
    """
    check_count("candidates", candidates)
    check_count("steps", steps)
    ts, y0s, ys = (jnp.asarray(x) for x in (ts, y0s, ys))
    if ys.shape[:2] != (*y0s.shape[:1], *ts.shape) or ys.ndim != 3:
        raise ValueError(
            f"`ys` has shape {ys.shape}; with `y0s` {y0s.shape} and `ts` {ts.shape} it is (series, times, "
            "channels)."
        )
    chosen = _joint_front(fronts)[:candidates]
    language = _language_of(chosen)
    fit = eqx.filter_jit(
        lambda codes, constants: _fitted(
            make_model, language, codes, constants, ts, y0s, ys, args, steps
        )
    )
    fields, losses = [], []
    for expressions in chosen:
        tapes = [to_tape(language, expression) for expression in expressions]
        codes, constants = (jnp.asarray(np.stack(x)) for x in zip(*tapes, strict=True))
        constants, loss = fit(codes, constants.astype(y0s.dtype))
        if np.isfinite(loss):
            rows = zip(np.asarray(codes), np.asarray(constants), strict=True)
            fields.append(Field(tuple(from_tape(language, *row) for row in rows)))
            losses.append(float(loss))
    if not fields:
        raise ValueError("None of the formulas can be solved from `y0s` over `ts`; search again.")
    return Refined(tuple(fields), np.asarray(losses), make_model)


class _TapeField(eqx.Module):
    """Tapes as a vector field: formulas that are data."""

    codes: Int[Array, "outputs length"]
    constants: Float[Array, "outputs length"]
    language: Language = eqx.field(static=True)

    def __call__(self, t: Array, y: Array, args: Any) -> Array:
        del t, args
        value = lambda codes, constants: evaluate(self.language, codes, constants, y[:, None])[0]
        return jax.vmap(value)(self.codes, self.constants)


def _fitted(make_model, language, codes, constants, ts, y0s, ys, args, steps):
    """Constants fitted through the solve, and the loss with them."""
    places = jax.vmap(lambda row: jnp.nonzero(row == CONSTANT, size=SLOTS, fill_value=row.size)[0])(
        codes
    )
    rows = jnp.arange(codes.shape[0])[:, None]
    is_seen = jnp.isfinite(ys)
    scale = jnp.nanstd(ys, axis=(0, 1), keepdims=True)
    scale = jnp.where(scale > 0, scale, 1.0)
    weight = 1 / jnp.sqrt(jnp.sum(is_seen).astype(ys.dtype))

    def misfits(slots, _):
        filled = constants.at[rows, places].set(slots, mode="drop")
        model = make_model(_TapeField(codes, filled, language))
        model = eqx.tree_at(lambda m: m.adjoint, model, diffrax.ForwardMode())
        found = jax.vmap(lambda y0: model.solve(ts, y0, args, throw=False).ys)(y0s)
        misfit = jnp.where(is_seen, (found - jnp.where(is_seen, ys, 0.0)) / scale, 0.0)
        # A solve that fails is far from the data, whatever the constants.
        return jnp.where(jnp.isfinite(misfit), misfit, 1e3) * weight

    start = constants.at[rows, places].get(mode="fill", fill_value=0.0)
    solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-10)
    found = optimistix.least_squares(
        misfits, solver, start, options={"jac": "fwd"}, max_steps=steps, throw=False
    )
    before, after = (jnp.sum(misfits(x, None) ** 2) for x in (start, found.value))
    better = after < before
    slots, loss = jnp.where(better, found.value, start), jnp.where(better, after, before)
    return constants.at[rows, places].set(slots, mode="drop"), jnp.where(loss < 1e3, loss, jnp.inf)


def _joint_front(fronts: Sequence[Front]) -> list[tuple[Expression, ...]]:
    """One formula per output: the combinations with the least sum of losses for their size."""
    rows = []
    for combination in itertools.product(*(zip(*front, strict=True) for front in fronts)):
        size = sum(expression.complexity for expression, _ in combination)
        rows.append((size, sum(loss for _, loss in combination), [e for e, _ in combination]))
    chosen, best = [], np.inf
    for _, loss, expressions in sorted(rows, key=lambda row: row[:2]):
        if loss < best:
            best = loss
            chosen.append(tuple(expressions))
    return chosen


def _language_of(candidates: Sequence[tuple[Expression, ...]]) -> Language:
    """The smallest language that has all of them."""
    expressions = [expression for candidate in candidates for expression in candidate]
    variables = expressions[0].variables
    used = {token for expression in expressions for token in expression.tokens}
    operators = sorted(used - {"#", *variables})
    return Language(variables, tuple(operators), max(e.complexity for e in expressions))


def _rounded(expression: Expression) -> str:
    constants = np.asarray([float(f"{c:.4g}") for c in np.asarray(expression.constants).tolist()])
    return str(Expression(constants, expression.tokens, expression.variables))

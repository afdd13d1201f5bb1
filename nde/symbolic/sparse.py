r"""Sparse regression: the few terms of a library that make up a field (SINDy).

    u(x) = sum_k c_k theta_k(x),        min |Theta c - u|^2 over supports of every size

Sequential thresholding: fit all terms, drop the one that is needed least, fit again, until one is left.
The threshold is raised just until a term falls, so there is one support of every size and no threshold
to choose; it is put on what the residual would gain without the term, c_k^2 / ((Theta^T Theta)^-1)_kk,
and not on |c_k|, which is large where terms nearly cancel. A library of up to 12 terms is small enough
to look at all supports, and the best of every size is taken: v and v^3 together are no reason to drop
v |v|. Each support is a formula. Which of them is right is decided by trajectories, and not by slopes:
`refine` fits the constants of the best through the solve, and chooses by the error there.

    fronts = symbolic.distill(model, states, variables=("x", "y"), by=symbolic.sparse,
                              library=symbolic.polynomials(("x", "y"), 3) + ("sin(x)",))
    found = symbolic.refine(fronts, lambda field: nde.HybridODE(known, field, parameters), ts, y0s, ys)

In code:    theta_k -> the texts in `library`, u -> targets
Not for:    what is no sum of known terms (a quotient, sin(w x) with unknown w): use `search`.
Reference:  Discovering governing equations from data by sparse identification of nonlinear dynamical
            systems (2016) | doi:10.1073/pnas.1517384113
"""

import itertools
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from nde.symbolic.constants import SLOTS
from nde.symbolic.expression import Expression
from nde.symbolic.front import Front, make_front
from nde.symbolic.regression import checked_data

__all__ = ["polynomials", "sparse"]

COLLINEAR = 0.999  # cosine of two terms over the points
EVERY = 12  # terms of a library whose supports are all looked at


def polynomials(variables: Sequence[str], degree: int) -> tuple[str, ...]:
    """The monomials of the variables up to a degree, without the constant: "x", "x * y", "x * x"."""
    return tuple(
        " * ".join(factors)
        for order in range(1, degree + 1)
        for factors in itertools.combinations_with_replacement(variables, order)
    )


def sparse(
    inputs: Float[ArrayLike, "points variables"],
    targets: Float[ArrayLike, "points outputs"],
    *,
    variables: Sequence[str],
    library: Sequence[str],
    terms: int = SLOTS,
) -> tuple[Front, ...]:
    """Sums of terms of a library for each column of `targets`.

    Args:
        inputs: Shape (points, variables).
        targets: Shape (points, outputs).
        variables: A name for every column of `inputs`.
        library: Formulas of the variables, as in `Expression.parse`: `polynomials(variables, 3)`, and
            whatever else may be in the field, such as "1.0", "sin(x)" or "v * abs(v)".
        terms: Most terms of a formula.

    Returns:
        One `Front` per output, for `refine`.

    Raises:
        ValueError: for data as of `search`, for a term that is not finite on the inputs, and for a
            library whose terms depend linearly on each other there.

    Warns:
        UserWarning: for terms that are nearly the same on the inputs: which of them is chosen is chance.
    """
    variables = tuple(variables)
    x, y = checked_data(inputs, targets, variables)
    if not library:
        raise ValueError("`library` is empty; give terms: nde.symbolic.polynomials(variables, 3).")
    columns = _columns(tuple(library), variables, x)
    lengths = np.linalg.norm(columns, axis=0)
    _check_independent(library, columns / lengths)
    fronts = []
    for target in np.asarray(y):
        found = []
        for support, constants in _supports(columns, lengths, target):
            if len(support) <= terms:
                residual = target - columns[:, support] @ constants
                names = [library[k] for k in support]
                found.append((_sum(names, constants, variables), np.mean(residual**2)))
        expressions, losses = zip(*found[::-1], strict=True)
        fronts.append(make_front(expressions, np.asarray(losses) / np.var(target)))
    return tuple(fronts)


def _columns(library: tuple[str, ...], variables: tuple[str, ...], x: Array) -> np.ndarray:
    """The terms at the points, shape (points, terms)."""
    rows = [jnp.asarray(row) for row in x]
    columns = np.stack([np.asarray(Expression.parse(t, variables)(*rows)) for t in library], axis=1)
    wrong = np.flatnonzero(~np.isfinite(columns).all(axis=0) | ~columns.any(axis=0))
    if wrong.size:
        raise ValueError(
            f"`library` has {[library[k] for k in wrong]}, which on the inputs are not finite, or zero."
        )
    return columns


def _check_independent(library: Sequence[str], unit: np.ndarray) -> None:
    cosines = np.abs(unit.T @ unit) - np.eye(unit.shape[1])
    a, b = np.unravel_index(int(np.argmax(cosines)), cosines.shape)
    rank = np.linalg.matrix_rank(unit)
    if rank < unit.shape[1]:
        raise ValueError(
            f"`library` has {unit.shape[1]} terms, of which only {rank} are independent on the inputs; "
            f"leave out one of {library[a]!r} and {library[b]!r}, which are closest, or give more points."
        )
    if cosines[a, b] > COLLINEAR:
        warnings.warn(
            f"`library` has {library[a]!r} and {library[b]!r}, which are nearly proportional on the "
            f"inputs (cosine {cosines[a, b]:.5f}); leave out one, or give inputs in which they differ.",
            stacklevel=3,
        )


def _supports(
    columns: Float[np.ndarray, "points terms"],
    lengths: Float[np.ndarray, " terms"],
    target: Float[np.ndarray, " points"],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Terms and their constants, from all of them to one."""
    if columns.shape[1] <= EVERY:
        return _best_supports(columns, lengths, target)
    support, found = np.arange(columns.shape[1]), []
    while support.size:
        unit = columns[:, support] / lengths[support]
        shares = np.linalg.lstsq(unit, target, rcond=None)[0]
        found.append((support, shares / lengths[support]))
        needed = shares**2 / np.diagonal(np.linalg.pinv(unit.T @ unit))
        support = np.delete(support, np.argmin(needed))
    return found


def _best_supports(
    columns: Float[np.ndarray, "points terms"],
    lengths: Float[np.ndarray, " terms"],
    target: Float[np.ndarray, " points"],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The support of every size that leaves the least residual."""
    triangle = np.linalg.qr(columns / lengths)
    rotated = triangle.Q.T @ target  # least squares in as many rows as there are terms
    found = []
    for size in range(columns.shape[1], 0, -1):
        fits = []
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            part = triangle.R[:, chosen]
            shares = np.linalg.lstsq(part, rotated, rcond=None)[0]
            fits.append((np.sum((rotated - part @ shares) ** 2), chosen, shares))
        _, chosen, shares = min(fits, key=lambda fit: fit[0])
        support = np.asarray(chosen)
        found.append((support, shares / lengths[support]))
    return found


def _sum(terms: Sequence[str], constants: np.ndarray, variables: tuple[str, ...]) -> Expression:
    """c_1 * term_1 + c_2 * term_2 + ..."""
    parts = []
    for term, constant in zip(terms, constants.tolist(), strict=True):
        # A constant term is its constant alone.
        is_number = not Expression.parse(term, variables).complexity > 1 and term not in variables
        value = constant * float(term) if is_number else constant
        parts.append(repr(value) if is_number else f"{value!r} * ({term})")
    return Expression.parse(" + ".join(parts), variables)

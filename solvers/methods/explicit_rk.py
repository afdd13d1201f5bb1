r"""One step of an explicit Runge-Kutta method, unrolled from its Butcher tableau.

With stages k_i = f(t_i, y_i) dX over a step [t0, t1],

    y_i = y0 + sum_{j<i} a_ij k_j,    t_i = t0 + c_i (t1 - t0)
    y1  = y0 + sum_i b_i k_i,         error = sum_i e_i k_i.

In code:    f -> vf, dX -> control, k_i -> ks[i], a, b, e -> `a_lower`, `b_sol`, `b_error`
Cost:       one evaluation of f per stage; one less when the last stage of a step is the first of the
            next (FSAL) and its value is handed over; one less again when nothing needs the last stage.
Reference:  Solving Ordinary Differential Equations I, Hairer, Norsett, Wanner (2008), chapter II

Written as straight-line code the step is differentiated by one `jax.vjp`: no inner loop to checkpoint.
"""

from typing import Any

import diffrax
import jax
import numpy as np
from jaxtyping import Array, PyTree

from nde.solvers import trees


def tableau_of(solver: diffrax.AbstractSolver) -> diffrax.ButcherTableau | None:
    """The tableau that describes the solver's step, if one does."""
    cls = type(solver)
    if issubclass(cls, diffrax.AbstractERK) and cls.step is diffrax.AbstractERK.step:
        return cls.tableau if isinstance(cls.tableau, diffrax.ButcherTableau) else None
    return None


def needed_stages(tableau: diffrax.ButcherTableau) -> int:
    """How many stages the solution itself depends on (6 of the 7 of Tsit5)."""
    return int(np.flatnonzero(tableau.b_sol)[-1]) + 1


def stages(
    tableau: diffrax.ButcherTableau,
    terms: diffrax.AbstractTerm,
    t0: Array,
    t1: Array,
    control: PyTree[Array],
    y0: PyTree[Array],
    args: Any,
    count: int,
    f0: PyTree[Array] | None = None,
) -> tuple[list[PyTree[Array]], PyTree[Array], PyTree[Array] | None]:
    """The first `count` stages.

    Args:
        control: the increment of the control from t0 to t1.
        f0: the vector field at (t0, y0) if it is known already, else None.

    Returns:
        The stages k_i, the argument y_i of the last of them, and the vector field there (None where
        only the product with the control was formed).
    """
    whole = tableau.fsal and not terms.is_vf_expensive(t0, t1, y0, args)
    field = jax.jit(lambda t, y: terms.vf(t, y, args))
    product = jax.jit(lambda t, y: terms.vf_prod(t, y, args, control))
    ks, yi, fi = [], y0, f0
    for i in range(count):
        if i > 0:
            c = float(tableau.c[i - 1])
            ti = t1 if c == 1.0 else t0 + c * (t1 - t0)
            yi, fi = trees.add(y0, trees.combine(tableau.a_lower[i - 1], ks)), None
        else:
            ti = t0
        if whole:
            fi = field(ti, yi) if fi is None else fi
            ks.append(terms.prod(fi, control))
        else:
            ks.append(product(ti, yi))
    return ks, yi, fi


def solution(
    tableau: diffrax.ButcherTableau, y0: PyTree[Array], ks: list[PyTree[Array]], y_last: PyTree
) -> PyTree[Array]:
    """y1. Where the last stage stands at y1 the two are one number, to the last bit."""
    if tableau.ssal and len(ks) == tableau.num_stages:
        return y_last
    return trees.add(y0, trees.combine(tableau.b_sol, ks))

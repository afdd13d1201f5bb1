"""What a solve costs: how often it evaluates its vector field.

Solvers that loop over their stages say how many there are. Of any other one, what it returns is traced
with a field that leaves a mark, and the marks are counted that the result depends on: what nobody uses
is not compiled.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree

from nde.solvers.estimates.wrapper import WithEstimates
from nde.solvers.lanes.closures import needed_eqns
from nde.solvers.methods.hypersolver import Hypersolver
from nde.solvers.reversible.solver import AbstractReversibleSolver

_MARK = "nde evaluation of leaf "


class Evaluations(NamedTuple):
    """How often the vector field is evaluated: once per solve, in every attempt, and behind a jump.

    A drift and its diffusion count as one. An implicit stage counts once; what its nonlinear solver
    evaluates besides is not counted, nor is the first stage in steps that might follow a jump.
    """

    start: int
    attempt: int
    jump: int = 0


class Wanted(NamedTuple):
    """What a solve asks of a step besides the next state."""

    error: bool
    dense: bool


# Solvers that evaluate anew behind a jump, or something else than the vector field of a term.
_KNOWN = {
    diffrax.ReversibleHeun: Evaluations(1, 1, 1),
    diffrax.ALIGN: Evaluations(1, 1),
    diffrax.ShOULD: Evaluations(1, 2),
    diffrax.QUICSORT: Evaluations(0, 2),
}


def of_solver(
    solver: Any, terms: PyTree[diffrax.AbstractTerm], args: Any, t0, t1, y0, state, wanted: Wanted
) -> Evaluations:
    """The cost of a solver's own `init` and `step`; of the `state` the shapes are enough."""
    kind = type(solver)  # a wrapper is also an instance, as diffrax sees it, of what it wraps
    if issubclass(kind, diffrax.HalfSolver):
        inner = wanted._replace(error=False)
        start, attempt, jump = of_solver(solver.solver, terms, args, t0, t1, y0, state, inner)
        # Two of the three begin at the jump, or at the start, where `init` has not evaluated.
        start *= 2 if isinstance(solver.solver, diffrax.AbstractRungeKutta) else 1
        return Evaluations(start, 3 * attempt, 2 * jump)
    if issubclass(kind, WithEstimates):
        inner, wanted = state.solver_state, Wanted(error=True, dense=True)
        return of_solver(solver.solver, terms, args, t0, t1, y0, inner, wanted)
    if issubclass(kind, Hypersolver):  # the rate that the correction sees is the base's first stage
        start, attempt, _ = of_solver(solver.base, terms, args, t0, t1, y0, state, wanted)
        return Evaluations(0, start + attempt)
    if issubclass(kind, diffrax.AbstractRungeKutta):
        tableau = solver.tableau
        if isinstance(tableau, diffrax.MultiButcherTableau):
            tableau = tableau.tableaus[0]
        stages = tableau.num_stages
        return Evaluations(1, stages - 1, 1) if tableau.fsal else Evaluations(0, stages)
    if issubclass(kind, diffrax.AbstractSRK):
        skipped = solver.tableau.ignore_stage_f
        stages = len(solver.tableau.b_sol)
        return Evaluations(0, stages - (0 if skipped is None else int(sum(skipped))))
    for known, cost in _KNOWN.items():
        if issubclass(kind, known):
            return cost

    def step(terms, state):
        y1, error, dense, state1, _ = solver.step(terms, t0, t1, y0, args, state, False)
        return y1, state1, error if wanted.error else None, dense if wanted.dense else None

    once, jump = counted(lambda terms: solver.init(terms, t0, t1, y0, args), terms), 0
    if issubclass(kind, AbstractReversibleSolver):
        jump = counted(lambda terms, s: solver.refresh(terms, t0, y0, s, args), terms, state)
    return Evaluations(once, counted(step, terms, state), jump)


def counted(
    fn: Callable[..., PyTree], terms: PyTree[diffrax.AbstractTerm], *examples: PyTree
) -> int:
    """How often `fn(terms, *examples)` needs the vector field of the first of the terms."""
    is_leaf = lambda x: isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)
    leaves, tree = jax.tree.flatten(terms, is_leaf=is_leaf)
    leaves[0] = _MarkingTerm(leaves[0])
    marking = jax.tree.unflatten(tree, leaves)
    arrays = lambda *examples: eqx.filter(fn(marking, *examples), eqx.is_array)
    closed = jax.make_jaxpr(arrays)(*examples)
    return max(_marks(closed.jaxpr).values(), default=0)


def _marks(jaxpr: Any) -> Counter[str]:
    """How often each leaf of the field is evaluated."""
    total: Counter[str] = Counter()
    for eqn in needed_eqns(jaxpr):
        name = eqn.params.get("name")
        if isinstance(name, str) and name.startswith(_MARK):
            total[name] += 1
            continue
        found = [_marks(inner) for inner in _inner(eqn)]
        if eqn.primitive.name == "cond":  # one of its branches
            found = [Counter({k: max(x[k] for x in found) for x in found for k in x})]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for marks in found * times:
            total += marks
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for param in eqn.params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield value


class _MarkingTerm(diffrax.AbstractTerm):
    """A term whose evaluations can be seen."""

    term: diffrax.AbstractTerm

    def vf(self, t, y, args):
        return _marked(self.term.vf(t, y, args))

    def vf_prod(self, t, y, args, control):
        return _marked(self.term.vf_prod(t, y, args, control))

    def contr(self, t0, t1, **kwargs):
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf, control):
        return self.term.prod(vf, control)

    def is_vf_expensive(self, t0, t1, y, args):
        return self.term.is_vf_expensive(t0, t1, y, args)


def _marked(values: PyTree[Array]) -> PyTree[Array]:
    arrays, rest = eqx.partition(values, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)
    named = [checkpoint_name(leaf, f"{_MARK}{i}") for i, leaf in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(tree, named), rest)

"""A vector field whose cotangents are computed once.

The cotangent of a stage is a sum over every use of the state in the field. XLA on a CPU takes such sums
for cheap, and evaluates them anew in every kernel that reads them: with n uses of the state the transpose
of a step reads some n^2 arrays a stage where n would do, and takes as long to compile. It does not look
through a branch: there a cotangent has to be there. (An accelerator's compiler keeps to a barrier.)

A neural network uses its state once or twice, and nothing changes. A network of twenty reactions writes
y[i] forty times, and is pulled back more than ten times faster (`benchmarks/ensemble.py` has one).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers._compat import Primitive, ad, batching, mlir

_READS = 256  # of numbers read again, up to which a branch costs more


class Held(eqx.Module):
    """The same field, `field(t, y, args)`."""

    field: Callable[..., PyTree[Array]]

    def __call__(self, t: Any, y: PyTree[Array], args: Any) -> PyTree[Array]:
        """The same value."""
        once = jax.jit(lambda t, y: self.field(t, y, args))
        jaxpr = once.trace(t, y).jaxpr.jaxpr
        uses = max((_uses(jaxpr, var) for var in jaxpr.invars[1:]), default=0)
        return _held(once(t, _held(y, uses)), uses)


def _uses(jaxpr: Any, var: Any) -> int:
    """How many operations read a variable, in the functions that it is handed to as well."""
    total = 0
    for eqn in jaxpr.eqns:
        places = [i for i, v in enumerate(eqn.invars) if v is var]
        if eqn.primitive.name == "jit":
            called = eqn.params["jaxpr"].jaxpr
            total += sum(_uses(called, called.invars[i]) for i in places)
        else:
            total += len(places)
    return total


def _held(x: PyTree[Array], uses: int) -> PyTree[Array]:
    if uses < 2:
        return x
    return jax.tree.map(lambda leaf: held_p.bind(leaf, uses=uses), x)


def _once(x: Array, *, uses: int) -> Array:
    """x itself, on both ways: which one is taken only a run can tell."""
    if uses * (uses - 1) * x.size <= _READS:
        return x
    same = lambda x: jnp.where(x == x, x, jnp.full_like(x, jnp.nan))
    first = x.reshape(-1)[0]
    return jax.lax.cond(first == first, lambda x: x, same, x)


def _pull(ct: Any, x: Any, *, uses: int) -> list[Any]:
    return [ct if type(ct) is ad.Zero else once_p.bind(ct, uses=uses)]


def _identity(name: str) -> Primitive:
    p = Primitive(name)
    p.def_impl(lambda x, *, uses: x)
    p.def_abstract_eval(lambda aval, *, uses: aval)
    batching.defvectorized(p)
    ad.deflinear2(p, _pull)
    return p


def _barrier(x: Array, *, uses: int) -> Array:
    return jax.lax.optimization_barrier(x)


held_p = _identity("nde_held")  # the identity, with a cotangent that is computed once
once_p = _identity("nde_once")  # what is computed once, and its tangent, and its cotangent
mlir.register_lowering(held_p, lambda ctx, x, *, uses: [x])
mlir.register_lowering(once_p, mlir.lower_fun(_barrier, multiple_results=False))
mlir.register_lowering(once_p, mlir.lower_fun(_once, multiple_results=False), platform="cpu")

"""Closure conversion: a Python function becomes a closed computation and the arrays it uses.

A vector field may be a module full of parameters, a lambda that closes over a traced value, or both.
Tracing it once shows every array that it depends on, wherever it came from. Those arrays, each once,
are the `Pool`; they become operands of the loop, where they can be batched and differentiated.
What a function does not use never enters the pool, and costs nothing on the way back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers._compat import eval_jaxpr


def inputs(eqn: Any) -> list[Any]:
    """The variables that an equation of a jaxpr reads; no literals."""
    return [x for x in eqn.invars if not is_literal(x)]


def is_literal(x: Any) -> bool:
    """Whether an atom of a jaxpr is a number, and not a variable."""
    return hasattr(x, "val")


def needed_eqns(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on, in order."""
    needed, eqns = {x for x in jaxpr.outvars if not is_literal(x)}, []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(inputs(eqn))
    return eqns[::-1]


class ClosedFunction(NamedTuple):
    """A traced function: `closed(consts, *args)`, where `consts` are the pool's arrays in order."""

    jaxpr: Any
    uses: tuple[int, ...]  # which arrays of the pool the function depends on
    out: PyTree[jax.ShapeDtypeStruct]

    @property
    def reads(self) -> set[int]:
        """Which of its arguments, leaf by leaf, the function depends on."""
        used = self._used()
        return {i for i, x in enumerate(self.jaxpr.invars) if x in used}

    @property
    def needs(self) -> set[int]:
        """Which arrays of the pool its value depends on: not those that it only touches."""
        used, pairs = self._used(), zip(self.uses, self.jaxpr.constvars, strict=True)
        return {i for i, x in pairs if x in used}

    def _used(self) -> set[Any]:
        """The variables that the value depends on."""
        used = {x for eqn in needed_eqns(self.jaxpr) for x in inputs(eqn)}
        return used | {x for x in self.jaxpr.outvars if not is_literal(x)}

    @property
    def computes(self) -> bool:
        """Whether anything is computed from the arguments or the pool, and not only handed on."""
        given = {*self.jaxpr.invars, *self.jaxpr.constvars}
        return any(not given.isdisjoint(inputs(eqn)) for eqn in needed_eqns(self.jaxpr))

    def __call__(self, consts: list[Array], *args: PyTree) -> PyTree:
        """Evaluates the function; every number becomes an array."""
        out = eval_jaxpr(self.jaxpr, [consts[i] for i in self.uses], *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.out), [jnp.asarray(x) for x in out])


class Pool:
    """The arrays that some traced functions close over, each kept once."""

    def __init__(self) -> None:
        self.consts: list[Any] = []
        self._index: dict[int, int] = {}

    def convert(self, fn: Callable[..., PyTree], *examples: PyTree) -> ClosedFunction:
        """Traces `fn` at the shapes of `examples`."""
        leaves, tree = jax.tree.flatten(examples)
        closed, out = jax.make_jaxpr(
            lambda *flat: fn(*jax.tree.unflatten(tree, flat)), return_shape=True
        )(*leaves)
        uses = tuple(self._add(const) for const in closed.consts)
        return ClosedFunction(closed.jaxpr, uses, out)

    def _add(self, const: Any) -> int:
        if id(const) not in self._index:
            self._index[id(const)] = len(self.consts)
            self.consts.append(const)
        return self._index[id(const)]

"""What is evaluated beside the loop, once in every lane: a solver's first state, outputs at t0 and t1.

Pulled back by itself, such a function would be pulled back in every lane, with a cotangent of zero in
one that failed; and where it is undefined, zero times NaN is NaN, which reaches the parameters that all
lanes share. As a program of `lanes` it knows its fellows: a lane that failed borrows from a healthy one
(`donors`) and contributes exactly nothing.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nde.solvers.adjoint.forward import masked
from nde.solvers.lanes import primitives as lanes
from nde.solvers.lanes.closures import Hoisted, Pool
from nde.solvers.lanes.donors import cleared, donors, rejoined, separated
from nde.solvers.lanes.primitives import Batch, Slot


def differentiated(
    fn: Callable[..., PyTree], value: PyTree[Array], healthy: Bool[Array, ""], *args: PyTree[Array]
) -> PyTree[Array]:
    """`value`, which is `fn(*args)` in one lane, with the derivative of `fn` where the lane is healthy,
    and none elsewhere.
    """
    pool = Pool()
    hoisted = pool.hoist(fn, *args)
    if not hoisted.computes:
        hold = lambda x: jnp.where(healthy, x, jax.lax.stop_gradient(x))
        return jax.tree.map(hold, value)
    values, tree = jax.tree.flatten(jax.lax.stop_gradient(value))
    program = _Beside(hoisted, len(pool.consts), args)
    operands = [*pool.consts, *values, healthy, *jax.tree.leaves(args)]
    return jax.tree.unflatten(tree, lanes.solve(program, operands))


class _Beside:
    """A program whose results are known, and only its gradient is not."""

    kept: tuple[Slot, ...] = ()

    def __init__(self, fn: Hoisted, consts: int, args: PyTree[Array]):
        self.fn, self.consts, self.tree = fn, consts, jax.tree.structure(args)
        is_inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
        outs = jax.tree.leaves(fn.out)
        self.results = tuple(Slot(x.shape, x.dtype, False, is_inexact(x)) for x in outs)

    def check_perturbed(self, perturbed: tuple[bool, ...]) -> None:
        """Everything has a derivative."""

    def forward(self, operands: list[Array], batch: Batch, keep: bool) -> list[Array]:
        """The values, in every lane."""
        del keep
        given = zip(operands[self.consts :], batch.levels[self.consts :], strict=True)
        values = [batch.spread(x, has) for x, has in given][: len(self.results)]
        return [x.reshape(batch.sizes + x.shape[1:]) for x in values]

    def backward(self, operands, batch: Batch, kept, cotangents, perturbed) -> list[Array]:
        """The cotangents of the perturbed operands."""
        del kept
        n, first = self.consts, self.consts + len(self.results) + 1
        own, consts = separated(batch, operands[:n])
        given = zip(operands[first - 1 :], batch.levels[first - 1 :], strict=True)
        healthy, *args = [batch.spread(x, has) for x, has in given]
        who = donors(healthy.astype(jnp.int32), own, consts)
        consts = who.lend_consts(consts, own)
        x, aux = eqx.partition(who.lend(args), eqx.is_inexact_array)
        ct_out = masked(healthy, self._filled(cotangents, batch))

        def pulled():
            _, ct_consts, ct_x = own.pull(self._inexact, perturbed[:n])(consts, x, aux, ct_out)
            return ct_consts, masked(healthy, ct_x)

        blank = lambda s: jnp.zeros(s.shape, s.dtype)
        none = lambda: jax.tree.map(blank, jax.eval_shape(pulled))
        ct_consts, ct_args = jax.lax.cond(jnp.any(healthy), pulled, none)
        numbers = [i for i in range(n) if perturbed[i]]
        totals = cleared(healthy, dict(zip(numbers, ct_consts, strict=True)), own)
        moved = [rejoined(batch, own, i, total) for i, total in totals.items()]
        for i, ct in enumerate(ct_args, start=first):
            if perturbed[i]:
                moved.append(batch.gather(ct, batch.levels[i]))
        return moved

    def _filled(self, cotangents: list[Array | None], batch: Batch) -> list[Array]:
        """Cotangents of the inexact results, zero where missing, with a flat lane axis."""
        slots = [slot for slot in self.results if slot.differentiable]
        zeros = [jnp.zeros((batch.lanes, *slot.shape), slot.dtype) for slot in slots]
        pairs = zip(cotangents, zeros, strict=True)
        return [zero if ct is None else ct.reshape(zero.shape) for ct, zero in pairs]

    def _inexact(self, consts: list[Array], x: list[Any], aux: list[Any]) -> list[Array]:
        args = jax.tree.unflatten(self.tree, eqx.combine(x, aux))
        out = jax.tree.leaves(self.fn(consts, *args))
        return [y for y, slot in zip(out, self.results, strict=True) if slot.differentiable]

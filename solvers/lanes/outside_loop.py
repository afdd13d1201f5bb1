"""What is evaluated outside the loop, once in every lane: a solver's first state, outputs at t0 and t1.

Pulled back by itself, such a function would be pulled back in every lane, with a cotangent of zero in
one that failed; and where it is undefined, zero times NaN is NaN, which reaches the parameters that all
lanes share. As a program of `primitives` it sees all lanes: one that failed copies the inputs of a
healthy one (`donors`) and contributes exactly nothing.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nde.solvers import trees
from nde.solvers.lanes import primitives
from nde.solvers.lanes.batch import Lanes, lane_shapes, masked
from nde.solvers.lanes.closures import ClosedFunction, Pool
from nde.solvers.lanes.donors import cleared, donors


def differentiated(
    fn: Callable[..., PyTree], value: PyTree[Array], healthy: Bool[Array, ""], *args: PyTree[Array]
) -> PyTree[Array]:
    """`value`, which is `fn(*args)` in one lane, with the derivative of `fn` where the lane is healthy,
    and none elsewhere.
    """
    pool = Pool()
    closed = pool.convert(fn, *args)
    if not closed.computes:
        hold = lambda x: jnp.where(healthy, x, jax.lax.stop_gradient(x))
        return jax.tree.map(hold, value)
    inputs = (jax.lax.stop_gradient(value), healthy, args)
    return primitives.solve(_OutsideLoop(closed, len(pool.consts), inputs), pool.consts, inputs)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known(fn: Callable[..., PyTree], consts: list[Array], args: PyTree[Array]) -> PyTree[Array]:
    """`fn(consts, args)`, which stands first in `args`."""
    return args[0]


@_known.defjvp
def _known_jvp(fn, primals, tangents):
    _, dots = jax.jvp(fn, primals, tangents)
    return primals[1][0], dots


class _OutsideLoop:
    """A program whose results are known, and only its gradient is not."""

    residuals = None

    def __init__(self, fn: ClosedFunction, consts: int, inputs: PyTree[Array]):
        self.fn, self.consts, self.args = fn, consts, jax.tree.structure(inputs)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), fn.out)
        self.results = lane_shapes(one, differentiable=True)

    def plain(self, lanes: Lanes, consts: list[Array], args: PyTree[Array]) -> PyTree[Array]:
        """The values again, with a derivative in the lanes that are healthy."""
        _, healthy, inputs = args
        out = lanes.per_lane(self.fn)(consts, *inputs)
        return trees.where(healthy, out, jax.tree.map(jax.lax.stop_gradient, out))

    def timed(self, perturbed: tuple[bool, ...]) -> set[int]:
        """None: everything is pulled back."""
        return set()

    def forward(
        self, lanes: Lanes, consts: list[Array], args: PyTree[Array], record: bool
    ) -> tuple[PyTree[Array], None]:
        """The values, in every lane."""
        del record
        return _known(ft.partial(self.plain, lanes), consts, args), None

    def backward(
        self,
        lanes: Lanes,
        consts: list[Array],
        args: PyTree[Array],
        residuals: None,
        cts: PyTree[Array | None],
        wanted: dict[int, Array],
    ) -> tuple[dict[int, Array], PyTree[Array | None]]:
        """The cotangents of the constants and of the function's arguments."""
        del residuals
        value, healthy, args = args
        who = donors(healthy.astype(jnp.int32), lanes, consts)
        consts = who.copied_consts(consts, lanes)
        x, aux = eqx.partition(who.copied(args), eqx.is_inexact_array)
        ct_out = masked(healthy, lanes.filled(self.results, cts))
        pull = lanes.pull(self._inexact, [i in wanted for i in range(len(consts))])

        def pulled() -> tuple[list[Array], PyTree[Array]]:
            _, ct_consts, ct_x = pull(consts, x, aux, ct_out)
            return ct_consts, masked(healthy, ct_x)

        blank = lambda s: jnp.zeros(s.shape, s.dtype)
        none = lambda: jax.tree.map(blank, jax.eval_shape(pulled))
        ct_consts, ct_args = jax.lax.cond(jnp.any(healthy), pulled, none)
        totals = cleared(healthy, dict(zip(wanted, ct_consts, strict=True)), lanes)
        return totals, (jax.tree.map(lambda _: None, value), None, ct_args)

    def _inexact(self, consts: list[Array], x: Any, aux: Any) -> PyTree[Array]:
        return eqx.filter(self.fn(consts, *eqx.combine(x, aux)), eqx.is_inexact_array)

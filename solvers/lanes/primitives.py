r"""A solve under `jax.vmap`: one loop for all lanes, one parameter gradient for all lanes.

A *lane* is one trajectory. `jax.vmap` of an ordinary differentiable loop differentiates each lane by
itself, so the backward loop carries one copy of every parameter cotangent per lane and adds them up at
the very end. Here the solve is one JAX primitive. Its batching rule hands the mapped axis to the
program below, which steps all lanes together and pulls back through the *batched* step: an unmapped
parameter then receives one cotangent per step, already summed.

Three primitives share the operands and the rules:

    solve      the forward loop; with `keep=True` also what the backward loop needs
    tangent    the symbolic derivative, linear in its tangents; never run, only transposed
    pullback   the backward loop: output cotangents -> operand cotangents

*Levels* are the axes that `vmap` has added, outermost first; `sizes` are their lengths, and `levels`
says for each operand which of them it carries. Levels added before differentiation (`grad(vmap(f))`)
share one cotangent per unmapped operand. Levels added after it (`vmap(grad(f))`) are the first `outer`
ones; there every lane keeps its own.

Layout: operands and per-lane results have the levels first; *rowed* arrays, written row by row during
the loop, have them after the row axis.
"""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers._compat import Primitive, ShapedArray, ad, batching, mlir

Levels = tuple[tuple[bool, ...], ...]


class Slot(NamedTuple):
    """The shape of one result of a program, for one lane."""

    shape: tuple[int, ...]
    dtype: Any
    rowed: bool = False  # the first axis is a row axis, and the levels come after it
    differentiable: bool = False

    def aval(self, sizes: tuple[int, ...]) -> Any:
        """The abstract value with the levels put in their place."""
        rows = self.shape[:1] if self.rowed else ()
        return ShapedArray(rows + sizes + self.shape[len(rows) :], self.dtype)


class Program(Protocol):
    """What a solve must say about itself. An instance is compared by identity.

    `forward` returns the results, and with `keep` also what `backward` needs; `backward` maps
    cotangents of the differentiable results (None: zero) to those of the perturbed operands;
    `check_perturbed` raises for an operand that has no derivative. Shapes are those of the module.
    """

    results: tuple[Slot, ...]
    kept: tuple[Slot, ...]

    def forward(self, operands: list[Array], batch: "Batch", keep: bool) -> list[Array]: ...

    def backward(
        self,
        operands: list[Array],
        batch: "Batch",
        kept: list[Array],
        cotangents: list[Array | None],
        perturbed: tuple[bool, ...],
    ) -> list[Array]: ...

    def check_perturbed(self, perturbed: tuple[bool, ...]) -> None: ...


class Batch(NamedTuple):
    """Which levels there are, and which operand carries which."""

    sizes: tuple[int, ...]
    levels: Levels
    outer: int = 0

    @property
    def lanes(self) -> int:
        """The number of trajectories."""
        return math.prod(self.sizes)

    def spread(self, operand: Array, levels: tuple[bool, ...]) -> Array:
        """An operand with one flat lane axis in front, repeated over the levels it lacks."""
        shape = operand.shape[sum(levels) :]
        own = iter(operand.shape)
        full = tuple(next(own) if has else 1 for has in levels) + shape
        operand = jnp.broadcast_to(operand.reshape(full), self.sizes + shape)
        return operand.reshape((self.lanes, *shape))

    def gather(self, cotangent: Array, levels: tuple[bool, ...]) -> Array:
        """The transpose of `spread`, except over the outer levels, which stay apart."""
        shape = cotangent.shape[1:]
        cotangent = cotangent.reshape(self.sizes + shape)
        shared = tuple(i for i in range(self.outer, len(self.sizes)) if not levels[i])
        return jnp.sum(cotangent, axis=shared) if shared else cotangent

    def per_lane(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """`fn(consts, *args)` for one lane -> the same for all, `args` having a flat lane axis.

        `consts` are the first operands, each with the levels that it carries.
        """
        return self._over(fn, 0, len(self.sizes))

    def _axes(self, level: int, consts: Sequence[Array]) -> list[int | None]:
        return [0 if has[level] else None for has in self.levels[: len(consts)]]

    def _over(self, fn: Callable[..., PyTree], first: int, last: int):
        sizes = self.sizes[first:last]

        def batched(consts: list[Array], *args: PyTree) -> PyTree:
            f = fn
            for i in reversed(range(first, last)):
                f = jax.vmap(f, in_axes=(self._axes(i, consts),) + (0,) * len(args))
            out = f(consts, *jax.tree.map(lambda x: x.reshape(sizes + x.shape[1:]), args))
            lanes = math.prod(sizes)
            return jax.tree.map(lambda x: x.reshape((lanes,) + x.shape[len(sizes) :]), out)

        return batched

    def pull(self, fn: Callable[..., PyTree], wrt: Sequence[bool]):
        """The value and the transposed derivative of `fn` over all lanes.

        `fn(consts, x, aux)` is written for one lane. The result maps `(consts, x, aux, ct)` to its
        value, the cotangents of the consts marked in `wrt`, summed over the inner levels they lack,
        and that of `x`.
        """
        inner_sizes = self.sizes[self.outer :]
        inner = self._over(fn, self.outer, len(self.sizes))

        def one(consts: list[Array], x: PyTree, aux: PyTree, ct: PyTree):
            chosen = [c for c, w in zip(consts, wrt, strict=True) if w]

            def primal(chosen: list[Array], x: PyTree) -> PyTree:
                fill = iter(chosen)
                full = [next(fill) if w else c for c, w in zip(consts, wrt, strict=True)]
                return inner(full, x, aux)

            out, transpose = jax.vjp(primal, chosen, x)
            return out, *transpose(ct)

        def batched(consts: list[Array], x: PyTree, aux: PyTree, ct: PyTree):
            f = one
            for i in reversed(range(self.outer)):
                f = jax.vmap(f, in_axes=(self._axes(i, consts), 0, 0, 0))
            outer = self.sizes[: self.outer]
            split = outer + (math.prod(inner_sizes),)
            apart = lambda tree: jax.tree.map(lambda a: a.reshape(split + a.shape[1:]), tree)
            out, ct_consts, ct_x = f(consts, apart(x), apart(aux), apart(ct))
            flat = lambda a: a.reshape((self.lanes,) + a.shape[len(split) :])
            return jax.tree.map(flat, out), ct_consts, jax.tree.map(flat, ct_x)

        return batched


def solve(program: Program, operands: Sequence[Array]) -> list[Array]:
    """Runs a program on one lane; `jax.vmap` and `jax.grad` of it follow the rules of this module."""
    levels = ((),) * len(operands)
    return solve_p.bind(*operands, program=program, sizes=(), levels=levels, keep=False)


# --- what the primitives do ---------------------------------------------------------------------


def _run_solve(*operands, program: Program, sizes, levels, keep):
    if 0 in sizes:
        avals = _solve_avals(program=program, sizes=sizes, levels=levels, keep=keep)
        return [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
    operands = [jnp.asarray(x) for x in operands]  # a literal arrives as a Python number
    return program.forward(operands, Batch(sizes, levels), keep)


def _run_pullback(*args, program: Program, sizes, levels, outer, perturbed, given):
    args = [jnp.asarray(x) for x in args]
    if 0 in sizes:
        axes = dict(sizes=sizes, levels=levels, outer=outer, perturbed=perturbed)
        avals = _pullback_avals(*args, program=program, given=given, **axes)
        return [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
    n, m = len(levels), len(program.kept)
    operands, kept, cts = args[:n], args[n : n + m], iter(args[n + m :])
    cotangents = [next(cts) if g else None for g in given]
    return program.backward(operands, Batch(sizes, levels, outer), kept, cotangents, perturbed)


def _run_tangent(*args, **params):
    del args, params
    raise NotImplementedError(
        "This adjoint supports reverse mode only (`jax.grad`, `jax.vjp`). For forward mode "
        "(`jax.jvp`, `jax.jacfwd`) use `adjoint=diffrax.ForwardMode()`, for both, or for second "
        "derivatives, `adjoint=diffrax.DirectAdjoint()`."
    )


# --- shapes --------------------------------------------------------------------------------------


def _solve_avals(*operands, program: Program, sizes, levels, keep):
    del operands, levels
    return [s.aval(sizes) for s in program.results + (program.kept if keep else ())]


def _tangent_avals(*args, program: Program, sizes, **params):
    del args, params
    return [s.aval(sizes) for s in program.results if s.differentiable]


def _pullback_avals(*args, program: Program, sizes, levels, outer, perturbed, given):
    del program, given
    avals = []
    for operand, has, wanted in zip(args, levels, perturbed, strict=False):
        if wanted:
            shape = sizes[:outer] + operand.shape[sum(has[:outer]) :]
            avals.append(ShapedArray(shape, operand.dtype))
    return avals


# --- differentiation -----------------------------------------------------------------------------


def _is_zero(x) -> bool:
    return type(x) is ad.Zero


def _solve_jvp(primals, tangents, *, program: Program, sizes, levels, keep):
    perturbed = tuple(not _is_zero(t) for t in tangents)
    if keep:
        _run_tangent()  # a derivative of a derivative
    program.check_perturbed(perturbed)
    out = solve_p.bind(*primals, program=program, sizes=sizes, levels=levels, keep=True)
    results, kept = out[: len(program.results)], out[len(program.results) :]
    moving = [t for t, p in zip(tangents, perturbed, strict=True) if p]
    out_tangents = iter(
        tangent_p.bind(
            *primals, *kept, *moving, program=program, sizes=sizes, levels=levels, outer=0,
            perturbed=perturbed,
        )
    )  # fmt: skip
    still = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
    pairs = zip(results, program.results, strict=True)
    return results, [next(out_tangents) if s.differentiable else still(x) for x, s in pairs]


def _tangent_transpose(cts, *args, program: Program, perturbed, **params):
    fixed = args[: len(args) - sum(perturbed)]
    if any(ad.is_undefined_primal(x) for x in fixed):
        _run_tangent()
    given = tuple(not _is_zero(ct) for ct in cts)
    shown = [ct for ct in cts if not _is_zero(ct)]
    if shown:
        moved = pullback_p.bind(
            *fixed, *shown, program=program, perturbed=perturbed, given=given, **params
        )
    else:
        moved = [ad.Zero(x.aval) for x in args[len(fixed) :]]
    return [None] * len(fixed) + list(moved)


# --- batching ------------------------------------------------------------------------------------


def _lane_axis(slot: Slot) -> int:
    return 1 if slot.rowed else 0


def _mapped_size(args, dims) -> int:
    return next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)


def _new_level(args, dims, levels):
    """Operands with the new axis in front, and levels that say who has it."""
    operands = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    return operands, tuple((d is not None, *has) for d, has in zip(dims, levels, strict=True))


def _filled(args, dims, slots, size):
    """Arrays that every lane needs for itself, repeated where they were shared."""
    out = []
    for x, d, slot in zip(args, dims, slots, strict=True):
        axis = _lane_axis(slot)
        if d is None:
            shape = x.shape[:axis] + (size,) + x.shape[axis:]
            out.append(jnp.broadcast_to(jnp.expand_dims(x, axis), shape))
        else:
            out.append(jnp.moveaxis(x, d, axis))
    return out


def _solve_batch(args, dims, *, program: Program, sizes, levels, keep):
    size = _mapped_size(args, dims)
    operands, levels = _new_level(args, dims, levels)
    out = solve_p.bind(*operands, program=program, sizes=(size, *sizes), levels=levels, keep=keep)
    slots = program.results + (program.kept if keep else ())
    return out, [_lane_axis(slot) for slot in slots]


def _pullback_batch(args, dims, *, program: Program, sizes, levels, outer, perturbed, given):
    params = dict(program=program, perturbed=perturbed, given=given)
    n, m = len(levels), len(program.kept)
    if all(d is None for d in dims[: n + m]):  # one solve, many cotangents (`jax.jacrev`)
        run = ft.partial(_run_pullback, sizes=sizes, levels=levels, outer=outer, **params)
        out = jax.vmap(run, in_axes=tuple(dims))(*args)
        return out, [0] * len(out)
    size = _mapped_size(args, dims)
    operands, levels = _new_level(args[:n], dims[:n], levels)
    kept = _filled(args[n : n + m], dims[n : n + m], program.kept, size)
    results = [s for s in program.results if s.differentiable]
    shown = [s for s, g in zip(results, given, strict=True) if g]
    cts = _filled(args[n + m :], dims[n + m :], shown, size)
    out = pullback_p.bind(
        *operands, *kept, *cts, sizes=(size, *sizes), levels=levels, outer=outer + 1, **params
    )
    return out, [0] * len(out)


def _tangent_batch(args, dims, *, program: Program, sizes, levels, outer, perturbed):
    n, m = len(levels), len(program.kept)
    size = _mapped_size(args, dims)
    operands, new_levels = _new_level(args[:n], dims[:n], levels)
    kept = _filled(args[n : n + m], dims[n : n + m], program.kept, size)
    front = Slot((), None)
    moving = _filled(args[n + m :], dims[n + m :], [front] * sum(perturbed), size)
    out = tangent_p.bind(
        *operands, *kept, *moving, program=program, sizes=(size, *sizes), levels=new_levels,
        outer=outer + 1, perturbed=perturbed,
    )  # fmt: skip
    return out, [_lane_axis(s) for s in program.results if s.differentiable]


def _primitive(name: str, run, avals, batch) -> Any:
    p = Primitive(name)
    p.multiple_results = True
    p.def_impl(lambda *args, **params: jax.jit(ft.partial(run, **params))(*args))
    p.def_abstract_eval(avals)
    mlir.register_lowering(p, mlir.lower_fun(run, multiple_results=True))
    batching.primitive_batchers[p] = batch
    return p


def _no_second_derivative(primals, tangents, **params):
    _run_tangent()


solve_p = _primitive("nde_solve", _run_solve, _solve_avals, _solve_batch)
tangent_p = _primitive("nde_tangent", _run_tangent, _tangent_avals, _tangent_batch)
pullback_p = _primitive("nde_pullback", _run_pullback, _pullback_avals, _pullback_batch)
ad.primitive_jvps[solve_p] = _solve_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[pullback_p] = _no_second_derivative

"""What of a model is trained: its floating arrays, but for numerics and data."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from nde._inputs import check_callable, check_instance
from nde._training.options import leaf_paths, marked
from nde.hybrid import Frozen

FIXED = (
    diffrax.AbstractSolver,
    diffrax.AbstractStepSizeController,
    diffrax.AbstractAdjoint,
    diffrax.AbstractPath,  # a measured input, a Brownian path: data
    Frozen,
)
FIRST_STEP = (jtu.GetAttrKey("dt0"),)  # the field of a model: a number, so no type tells it


def trained(model: PyTree, frozen: Callable | None) -> PyTree[bool]:
    """Which leaves of a model are trained."""

    def is_fixed(node: Any) -> bool:
        return isinstance(node, FIXED)

    def trains(path: tuple, node: Any) -> Any:
        if is_fixed(node) or path[-1:] == FIRST_STEP:
            return jax.tree.map(lambda leaf: False, node)
        return eqx.is_array(node) and bool(jnp.issubdtype(node.dtype, jnp.floating))

    check_instance("model", model)
    mask = jtu.tree_map_with_path(trains, model, is_leaf=is_fixed)
    if frozen is None:
        return mask
    check_callable("frozen", frozen, "(model)")
    return marked(frozen, "frozen", mask, model, False)


def split(model: PyTree, frozen: Callable | None) -> tuple[PyTree, PyTree, PyTree]:
    """The trained arrays, the other arrays, and everything that is not an array."""
    params, rest = eqx.partition(model, trained(model, frozen))
    if not jax.tree.leaves(params):
        raise ValueError(
            f"`model` has nothing to train: of its leaves {leaf_paths(model)} none is a floating "
            "array that is not frozen."
        )
    fixed, static = eqx.partition(rest, eqx.is_array)
    return strongly_typed(params), fixed, static


def strongly_typed(tree: PyTree) -> PyTree:
    """Arrays whose type an update cannot change: a weakly typed one would be compiled for again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype), tree)

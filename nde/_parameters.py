r"""Physical parameters: numbers with a name, a range, and a value to start from.

What must keep a range is trained in a coordinate in which it cannot leave it:

    Positive    phi = exp(u)                              a rate, a mass, a standard deviation
    Bounded     phi = low + (high - low) sigmoid(u)       a probability, an efficiency
    Frozen      phi held fixed                            a measured constant

Where subjects differ (patients, plants, experiments), u has one value for each of them:

    PerSubject      u_1, u_2, ...                         nothing is shared
    RandomEffect    u_i = u + spread eta_i,  eta_i ~ N(0, 1)    spread around a shared u

`of_subject(model, i)` is the model of subject i, in which these are ordinary parameters again.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from nde.solvers.inputs import check_count, is_traced


class AbstractParameter(eqx.Module):
    """A physical parameter that is stored in other coordinates."""

    def __repr__(self) -> str:
        value = self.value
        shown = eqx.tree_pformat(value) if is_traced(value) else str(value)
        return f"{type(self).__name__}({shown})"

    @property
    @abstractmethod
    def value(self) -> Float[Array, "..."]:
        """The physical value, of the shape it was made with."""


class Positive(AbstractParameter):
    """A parameter that stays positive, trained as its logarithm.

    Args:
        value: Initial physical value, any shape.

    Raises:
        ValueError: if a value is not positive and finite in its precision.
    """

    log_value: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        _check_range("Positive", value, 0.0, np.inf)
        self.log_value = jnp.log(_floating(value))

    @property
    def value(self) -> Float[Array, "..."]:
        return jnp.exp(self.log_value)


class Bounded(AbstractParameter):
    """A parameter that stays between two bounds, trained through a sigmoid.

    Args:
        value: Initial physical value, any shape, strictly inside the bounds.
        low: Lower bound, a finite number.
        high: Upper bound, a finite number.

    Raises:
        ValueError: for another bound, or a value that is not strictly between the two in its
            precision.
    """

    logit: Float[Array, "..."]
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __init__(self, value: ArrayLike, low: float, high: float):
        self.low, self.high = _bound("low", low), _bound("high", high)
        if not self.low < self.high:
            raise ValueError(
                f"`low` of Bounded is {low} and `high` is {high}; write Bounded(value, low, high)."
            )
        _check_range("Bounded", value, self.low, self.high)
        value = _floating(value)
        self.logit = jnp.log(value - self.low) - jnp.log(self.high - value)

    @property
    def value(self) -> Float[Array, "..."]:
        return self.low + (self.high - self.low) * jax.nn.sigmoid(self.logit)


class Frozen(AbstractParameter):
    """A parameter that is not trained: `nde.fit` leaves it alone, and its gradient is zero
    everywhere else. (Weight decay moves what has no gradient: in a loop of your own, mask it.)

    Args:
        constant: Physical value, any shape.
    """

    constant: Float[Array, "..."]

    def __init__(self, constant: ArrayLike):
        self.constant = _floating(constant)

    @property
    def value(self) -> Float[Array, "..."]:
        return jax.lax.stop_gradient(self.constant)


class PerSubject(AbstractParameter):
    """A parameter of which every subject has a value of its own, and nothing is shared.

    Args:
        parameter: Of all subjects: numbers of shape (subjects, ...), or a `Positive`, `Bounded` or
            `Frozen` of such. Where several experiments share a value, they are of one subject.

    Raises:
        ValueError: for a parameter without a first axis.
    """

    parameter: Any

    def __init__(self, parameter: Any):
        self.parameter = _one_of(parameter)
        if jnp.ndim(self.value) == 0:
            raise ValueError(
                f"`parameter` of PerSubject is the number {self.value}; it has a value for every "
                "subject: PerSubject(Positive(jnp.full(subjects, value)))."
            )

    @property
    def value(self) -> Float[Array, "subjects ..."]:
        return physical(self.parameter)

    def of(self, subject: Int[Array, ""]) -> Any:
        """The parameter of one subject."""
        return jax.tree.map(lambda u: _row(u, subject), self.parameter)


class RandomEffect(AbstractParameter):
    """A parameter that varies between subjects around a shared value: log-normal around a `Positive`,
    normal around a number, logit-normal around a `Bounded`.

    Args:
        center: The shared value, which is trained: a number or an array, `Positive` or `Bounded`.
        spread: Standard deviation of the subjects, in the coordinate u of the center: 0.3 of a
            `Positive` is about 30 %. It is held: with it free, the most probable values of subjects
            are all alike. `nde.inference.mixed_effects` estimates it.
        subjects: Number of subjects.

    Raises:
        ValueError: for a spread that is not positive, no subjects, or another kind of center.
    """

    center: Any
    spread: Frozen
    offsets: Float[Array, "subjects ..."]

    def __init__(self, center: Any, spread: ArrayLike, subjects: int):
        check_count("subjects", subjects)
        if isinstance(center, Frozen | PerSubject | RandomEffect):
            raise ValueError(
                f"`center` is {center!r}; it is trained: a number, Positive or Bounded. To hold it, "
                "name it in `frozen` of the fit."
            )
        if not is_traced(spread) and not (np.isfinite(spread) & (np.asarray(spread) > 0)).all():
            raise ValueError(f"`spread` is {spread}; a standard deviation is positive.")
        self.center, self.spread = _one_of(center), Frozen(spread)
        (u,) = jax.tree.leaves(self.center)
        self.offsets = jnp.zeros((int(subjects), *u.shape), u.dtype)

    @property
    def value(self) -> Float[Array, "subjects ..."]:
        subjects = jnp.arange(self.offsets.shape[0])
        return jax.vmap(lambda subject: physical(self.of(subject)))(subjects)

    def of(self, subject: Int[Array, ""]) -> Any:
        """The parameter of one subject, of the kind of the center."""
        moved = self.spread.value * _row(self.offsets, subject)
        return jax.tree.map(lambda u: u + moved.astype(u.dtype), self.center)


def of_subject(tree: PyTree[Any], subject: Int[ArrayLike, ""]) -> PyTree[Any]:
    """A model, or any tree with parameters, of one subject: `PerSubject` and `RandomEffect` become
    parameters of the kind that they hold; what else is in the tree is shared and stays.

    Args:
        tree: The model of all subjects.
        subject: Number of the subject, from 0; may be traced. One that is not there gives nan.
    """
    subject = jnp.asarray(subject)
    return jax.tree.map(
        lambda leaf: leaf.of(subject) if _varies(leaf) else leaf, tree, is_leaf=_varies
    )


def random_effects(tree: PyTree[Any]) -> list[RandomEffect]:
    """Those in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=_varies)
    return [leaf for leaf in leaves if isinstance(leaf, RandomEffect)]


def number_of_subjects(tree: PyTree[Any]) -> int | None:
    """How many subjects a tree is of; None where nothing in it varies between them."""
    varying = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_varies) if _varies(leaf)]
    counts = {jax.tree.leaves(leaf)[-1].shape[0] for leaf in varying}
    if len(counts) > 1:
        raise ValueError(
            f"The parameters are of {sorted(counts)} subjects; all that vary between subjects have one "
            "value for each of the same."
        )
    return counts.pop() if counts else None


def physical(parameters: PyTree[Any]) -> PyTree[Any]:
    """The parameters in physical units; what else is in the tree, a network, as it is."""
    value = lambda leaf: leaf.value if _is_parameter(leaf) else leaf
    return jax.tree.map(value, parameters, is_leaf=_is_parameter)


def check_made(parameters: PyTree[Any]) -> None:
    """No leaf of `parameters` is a class that was meant to be called."""
    for leaf in jax.tree.leaves(parameters):
        if isinstance(leaf, type):
            name = leaf.__name__
            raise ValueError(f"`parameters` holds the class {name}; make one: {name}(value).")


def floating_leaves(tree: PyTree) -> PyTree:
    """Numbers and number arrays become floating arrays, so that whatever is not `Frozen` trains."""
    return jax.tree.map(
        lambda leaf: (
            leaf if _is_parameter(leaf) or not eqx.is_array_like(leaf) else _floating(leaf)
        ),
        tree,
        is_leaf=_is_parameter,
    )


def _is_parameter(node: Any) -> bool:
    return isinstance(node, AbstractParameter)


def _varies(node: Any) -> bool:
    return isinstance(node, PerSubject | RandomEffect)


def _row(u: Float[Array, "subjects ..."], subject: Int[Array, ""]) -> Float[Array, "..."]:
    # A subject that is not there must not look like the last one.
    return u.at[subject].get(mode="fill", fill_value=jnp.nan)


def _one_of(parameter: Any) -> Any:
    """A parameter, or a number as one that is trained."""
    check_made(parameter)
    return parameter if _is_parameter(parameter) else _floating(parameter)


def _floating(value: ArrayLike) -> Float[Array, "..."]:
    """A strongly typed floating array: a Python number would change its type at the first
    update."""
    return jnp.asarray(value, dtype=_precision(value))


def _precision(value: ArrayLike) -> np.dtype:
    floating = eqx.is_array(value) and jnp.issubdtype(jnp.result_type(value), jnp.floating)
    return jnp.result_type(value) if floating else jnp.result_type(float)


def _bound(name: str, bound: float) -> float:
    number = eqx.is_array_like(bound) and not is_traced(bound)
    if number and np.ndim(bound) == 0 and np.isfinite(bound):
        return float(bound)
    raise ValueError(
        f"`{name}` of Bounded is {bound}; a bound is one finite number. Use Positive where there is "
        "no upper bound, and one Bounded for each entry with bounds of its own."
    )


def _check_range(name: str, value: ArrayLike, low: float, high: float) -> None:
    """Also refuses what rounds to a limit: no coordinate gives it back."""
    if is_traced(value):
        return
    dtype = _precision(value)
    info = jnp.finfo(dtype)
    with np.errstate(all="ignore"):
        stored, least, most = (np.asarray(x, dtype) for x in (value, low, high))
        # Smaller numbers are flushed to zero, and 1 + exp(-u) of the sigmoid loses smaller shares.
        inside = (stored - least >= info.tiny) & (most - stored >= info.eps * (most - least))
    if not inside.all():
        raise ValueError(
            f"`value` of {name} is {value}; it must be strictly between {low} and {high}, by more "
            f"than the rounding of {dtype}."
        )

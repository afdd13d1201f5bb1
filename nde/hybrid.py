r"""Known equations with a learned part (universal differential equations).

    dy/dt = known(t, y, phi) + network(t, y, args)

`phi`, the physical parameters, are a PyTree of arrays with a name each: {"growth": Positive(0.5),
"gravity": Frozen(9.81)}. What is not said is trained; what must keep a range is trained in a
coordinate in which it cannot leave it:

    Positive    phi = exp(u)                              a rate, a mass, a standard deviation
    Bounded     phi = low + (high - low) sigmoid(u)       a probability, an efficiency
    Frozen      phi held fixed                            a measured constant

The sum is the default; `combine` puts the network, and what is given as `args` (a measured input),
anywhere in the equations. With `network=None` the model is the known equations alone: the
mechanistic fit that every hybrid model should be compared with.

A network that starts at zero (`MLPField(..., last_layer_scale=0.0)`) starts the training at the
known model. Known part and network may both explain the data: then `phi` means nothing, unless the
loss keeps the network small.

Reference:  Universal Differential Equations for Scientific Machine Learning (2020) |
    arXiv:2001.04385
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from nde._initial_value import AbstractODE
from nde._inputs import check_callable
from nde._solve import Rates
from nde.fields import Batched
from nde.solvers.inputs import is_traced

__all__ = ["Bounded", "Frozen", "HybridODE", "Positive", "additive"]


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


def additive(
    known: Callable,
    network: Callable,
    t: Float[Array, ""],
    y: PyTree,
    parameters: PyTree,
    args: PyTree,
) -> PyTree:
    """The default `combine`: known(t, y, parameters) + network(t, y, args), shaped like y."""
    terms = known(t, y, parameters), network(t, y, args)
    # The sum would broadcast one of them.
    shapes = [jax.tree.map(jnp.shape, term) for term in terms]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`known` returned shape {shapes[0]} but `network` returned shape {shapes[1]}; return "
            "one rate for every entry of the state from both, or say with `combine` where the "
            "network enters."
        )
    return jax.tree.map(jnp.add, *terms)


class HybridODE(AbstractODE):
    """Known equations plus a network. One example in, one trajectory out; see the module for the
    equation.

    Args:
        known: `known(t, y, parameters) -> dy`, shaped like the state: any diffrax vector field
            whose `args` are its parameters.
        network: `network(t, y, args)`, such as `nde.fields.MLPField`; `None` for the known
            equations alone.
        parameters: PyTree of physical parameters: numbers or arrays, `Positive`, `Bounded`,
            `Frozen`. `known` sees their physical values.
        combine: `combine(known, network, t, y, parameters, args) -> dy`, shaped like the state. For
            a network inside the known equations, such as a transmission rate, `lambda known,
            network, t, y, p, args: known(t, y, p | {"rate": jax.nn.softplus(network(t, y,
            args)[0])})`; for an input of each example, `lambda known, network, t, y, p, path:
            known(t, y, p | {"input": path.evaluate(t)})`, also with `network=None`. A step may jump over
            what such an input does meanwhile, unless steps end at its knots:
            `stepsize_controller=diffrax.ClipStepSizeController(controller, step_ts=path.ts)`.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for input that cannot
            be solved, and for `args` that nothing takes.
    """

    known: Callable
    network: Callable | None
    parameters: PyTree[Any] = eqx.field(converter=lambda tree: _floating_leaves(tree))
    combine: Callable = eqx.field(default=additive, kw_only=True)

    def __check_init__(self):
        if isinstance(self.known, Batched):
            raise ValueError(
                "`known` is a Batched field, which would take the parameters for those of single "
                "examples. Make the model of one example, and batch all of it: "
                "nde.NeuralODE(nde.fields.Batched(hybrid.vector_field))."
            )
        for leaf in jax.tree.leaves(self.parameters):
            if isinstance(leaf, type):
                name = leaf.__name__
                raise ValueError(f"`parameters` holds the class {name}; make one: {name}(value).")
        check_callable("known", self.known, "(t, y, parameters)")
        if self.network is not None:
            check_callable("network", self.network, "(t, y, args)")
        if self.combine is not additive:
            check_callable("combine", self.combine, "(known, network, t, y, parameters, args)")

    def vector_field(self, t: Float[Array, ""], y: PyTree, args: PyTree[Any]) -> PyTree:
        """The rate of change at time `t`, shape (), and state `y`; shaped like `y`."""
        parameters = self.physical_parameters()
        if self.network is None and self.combine is additive:
            if args is not None:
                raise ValueError(
                    "`args` was given, but without a network nothing takes it: `known` sees its "
                    "parameters only. Say with `combine` where it enters: lambda known, network, t, "
                    'y, p, args: known(t, y, p | {"input": args}).'
                )
            return self.known(t, y, parameters)
        network = _absent if self.network is None else self.network
        return self.combine(self.known, network, t, y, parameters, args)

    def terms(self) -> diffrax.ODETerm:
        """dy/dt = vector_field(t, y, args)."""
        return diffrax.ODETerm(Rates(self.vector_field))

    def lift(self, t: Float[Array, ""], y0: PyTree, args: PyTree[Any]) -> PyTree:
        """The state as it is given."""
        return y0

    def read(self, t: Float[Array, ""], y: PyTree, args: PyTree[Any]) -> PyTree:
        """The state as it is."""
        return y

    def physical_parameters(self) -> PyTree[Float[Array, "..."]]:
        """The parameters by name, in physical units and the shapes they were made with."""
        return jax.tree.map(
            lambda leaf: leaf.value if _is_parameter(leaf) else leaf,
            self.parameters,
            is_leaf=_is_parameter,
        )


def _absent(t: Array, y: PyTree, args: PyTree) -> PyTree:
    del t, y, args
    raise ValueError(
        "`combine` calls the network, but `network` is None; for the known equations alone leave out "
        "`combine`, or give one that does without."
    )


def _is_parameter(node: Any) -> bool:
    return isinstance(node, AbstractParameter)


def _floating(value: ArrayLike) -> Float[Array, "..."]:
    """A strongly typed floating array: a Python number would change its type at the first
    update."""
    return jnp.asarray(value, dtype=_precision(value))


def _precision(value: ArrayLike) -> np.dtype:
    floating = eqx.is_array(value) and jnp.issubdtype(jnp.result_type(value), jnp.floating)
    return jnp.result_type(value) if floating else jnp.result_type(float)


def _floating_leaves(tree: PyTree) -> PyTree:
    """Numbers and number arrays become floating arrays, so that whatever is not `Frozen` trains."""
    return jax.tree.map(
        lambda leaf: (
            leaf if _is_parameter(leaf) or not eqx.is_array_like(leaf) else _floating(leaf)
        ),
        tree,
        is_leaf=_is_parameter,
    )


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

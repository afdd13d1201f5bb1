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

What the states keep by construction is said with `coordinates`: the equation is solved in

    Logarithms    u = log y,  u' = f / y                      states stay positive
    Shares        y = T exp(u) / sum exp(u),  u' = f / y      ... and so does their total T, exactly

whatever the network does; `Conserving` keeps a weighted total of any states.

A network that starts at zero (`MLPField(..., last_layer_scale=0.0)`) starts the training at the
known model. Known part and network may both explain the data: then `phi` means nothing, unless the
loss keeps the network small.

Reference:  Universal Differential Equations for Scientific Machine Learning (2020) |
    arXiv:2001.04385
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nde._coordinates import AbstractCoordinates
from nde._coordinates import Conserving as Conserving
from nde._coordinates import Logarithms as Logarithms
from nde._coordinates import Shares as Shares
from nde._initial_value import AbstractODE
from nde._inputs import check_callable, check_instance
from nde._parameters import Bounded as Bounded
from nde._parameters import Frozen as Frozen
from nde._parameters import PerSubject as PerSubject
from nde._parameters import Positive as Positive
from nde._parameters import RandomEffect as RandomEffect
from nde._parameters import check_made, floating_leaves, physical
from nde._parameters import of_subject as of_subject
from nde._solve import Rates
from nde.fields import Batched

__all__ = [
    "Bounded",
    "Conserving",
    "Frozen",
    "HybridODE",
    "Logarithms",
    "PerSubject",
    "Positive",
    "RandomEffect",
    "Shares",
    "additive",
    "of_subject",
]


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
        coordinates: `Logarithms()` for states that stay positive, `Shares()` for such with a constant
            total; None solves for the state as it is.
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
    parameters: PyTree[Any] = eqx.field(converter=floating_leaves)
    combine: Callable = eqx.field(default=additive, kw_only=True)
    coordinates: AbstractCoordinates | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        if isinstance(self.known, Batched):
            raise ValueError(
                "`known` is a Batched field, which would take the parameters for those of single "
                "examples. Make the model of one example, and batch all of it: "
                "nde.NeuralODE(nde.fields.Batched(hybrid.vector_field))."
            )
        check_made(self.parameters)
        check_callable("known", self.known, "(t, y, parameters)")
        if self.network is not None:
            check_callable("network", self.network, "(t, y, args)")
        if self.combine is not additive:
            check_callable("combine", self.combine, "(known, network, t, y, parameters, args)")
        check_instance("coordinates", self.coordinates)

    def vector_field(self, t: Float[Array, ""], y: PyTree, args: PyTree[Any]) -> PyTree:
        """The rate of change of what is solved for: of the coordinates, or of the state itself."""
        if self.coordinates is None:
            return self.rate(t, y, args)
        state = self.coordinates.decode(y)
        return self.coordinates.rate(y, state, self.rate(t, state, args))

    def rate(self, t: Float[Array, ""], y: PyTree, args: PyTree[Any] = None) -> PyTree:
        """The rate of change of the state at time `t`, shape (), and state `y`; shaped like `y`."""
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
        """The state as it is given, or its coordinates."""
        return y0 if self.coordinates is None else self.coordinates.encode(y0)

    def read(self, t: Float[Array, ""], y: PyTree, args: PyTree[Any]) -> PyTree:
        """The state."""
        return y if self.coordinates is None else self.coordinates.decode(y)

    def physical_parameters(self) -> PyTree[Float[Array, "..."]]:
        """The parameters by name, in physical units and the shapes they were made with."""
        return physical(self.parameters)


def _absent(t: Array, y: PyTree, args: PyTree) -> PyTree:
    del t, y, args
    raise ValueError(
        "`combine` calls the network, but `network` is None; for the known equations alone leave out "
        "`combine`, or give one that does without."
    )

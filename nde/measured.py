r"""From a model to measurements: where it starts, what of it is observed, and with what error.

    y' = f(t, y; phi_i, args_i),    y(t0_i) = start(phi_i, x_i),    y(d+) = y(d-) + dose
    m_ij = observe(t_ij, y(t_ij); phi_i, x_i),        measured ~ errors(m_ij)

for experiment i with its own times, doses, inputs (args_i) and covariates (x_i), and phi_i the parameters
of its subject (`nde.hybrid.RandomEffect`, `PerSubject`). One record serves `nde.fit` (with
`nde.losses.negative_log_likelihood`) and `nde.least_squares` (with `nde.inference.measured_residuals`).

    start     an array: free; `Frozen`: known; a function of parameters and covariates, or a network;
              a `PerSubject` or `RandomEffect`
    observe   a sum, a count, a concentration; None: the state itself

A parameter that occurs in several places, in the equation and in `observe`, is one entry of
`parameters` that both read.

Not for:    errors that are correlated in time, or noise in the equation (`nde.NeuralSDE`).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from nde._dosing import states_at
from nde._errors import AbstractErrors as AbstractErrors
from nde._errors import Gaussian as Gaussian
from nde._errors import LogNormal as LogNormal
from nde._errors import NegativeBinomial as NegativeBinomial
from nde._errors import Poisson as Poisson
from nde._experiments import Experiments as Experiments
from nde._experiments import by_subject as by_subject
from nde._experiments import experiments as experiments
from nde._initial_value import AbstractODE
from nde._inputs import check_callable, check_instance
from nde._parameters import AbstractParameter, floating_leaves, of_subject, physical

__all__ = [
    "Experiments",
    "Gaussian",
    "LogNormal",
    "Measured",
    "NegativeBinomial",
    "Poisson",
    "by_subject",
    "experiments",
]


class Measured(eqx.Module):
    """An ODE model with what it takes to compare it with measurements: one experiment in, its means
    out; `jax.vmap(model)(data)` is the batch. See the module for the equations.

    Args:
        ode: An ODE model, such as an `nde.HybridODE`.
        start: State at t0: an array or a PyTree of arrays (free), of `Frozen`, `Positive` ... or
            `start(parameters, covariates)`.
        observe: `observe(t, y, parameters, covariates)`, the means of what is measured at one time, shape
            (channels,); None: the state.
        errors: The law of the errors, such as `Gaussian(0.1)`; None: `Gaussian(1.0)`.

    `parameters` are those of the ode in physical units, of the subject of the experiment; `None` for a
    model without. `covariates` are those of the experiment, and its `args` are those of the equation.

    Raises:
        ValueError: for parts that can never work, and, at a call, for means that do not fit what was
            measured.

    Example:
        >>> model = nde.Measured(
        ...     nde.HybridODE(kinetics, None, {"k": Positive(1.0), "volume": Positive(0.5)}),
        ...     start=lambda p, x: x["dose"][None],
        ...     observe=lambda t, y, p, x: y / p["volume"],
        ...     errors=nde.measured.LogNormal(0.2),
        ... )
    """

    ode: AbstractODE
    start: Any
    observe: Callable | None
    errors: AbstractErrors

    def __init__(
        self,
        ode: AbstractODE,
        start: Any,
        observe: Callable | None = None,
        errors: AbstractErrors | None = None,
    ):
        errors = Gaussian(1.0) if errors is None else errors
        for name, value, kind in (
            ("ode", ode, AbstractODE),
            ("errors", errors, AbstractErrors),
        ):
            check_instance(name, value)
            if not isinstance(value, kind):
                raise ValueError(f"`{name}` is {value!r}; give {_WANTED[name]}.")
        if _is_function(start):
            check_callable("start", start, "(parameters, covariates)")
        if observe is not None:
            check_callable("observe", observe, "(t, y, parameters, covariates)")
        self.ode, self.observe, self.errors = ode, observe, errors
        self.start = start if _is_function(start) else floating_leaves(start)

    def __call__(self, experiment: Experiments) -> Float[Array, "times channels"]:
        """The means at the times of one experiment."""
        return self.means(experiment, throw=True)[0]

    def means(
        self, experiment: Experiments, *, throw: bool = False
    ) -> tuple[Float[Array, "times channels"], Bool[Array, ""]]:
        """The same, and whether the solve failed; with `throw` a failed solve raises."""
        states, failed = self.states(experiment, throw=throw)
        observe = self.observe
        if observe is None:
            means = states
        else:
            own = of_subject(self, experiment.subject)
            p = own.parameters()
            means = jax.vmap(lambda t, y: observe(t, y, p, experiment.covariates))(
                experiment.ts, states
            )
        if jnp.shape(means) != experiment.ys.shape:
            raise ValueError(
                f"`observe` gives means of shape {jnp.shape(means)[1:]} at each time but "
                f"{experiment.ys.shape[1:]} were measured; return one mean for each, in an array of "
                "shape (channels,)."
            )
        return means, failed

    def states(
        self, experiment: Experiments, *, throw: bool = True
    ) -> tuple[PyTree[Float[Array, "times ..."]], Bool[Array, ""]]:
        """The states at the times of one experiment, and whether the solve failed."""
        own = of_subject(self, experiment.subject)
        return states_at(
            own.ode,
            experiment.ts,
            own.initial_state(experiment.covariates),
            experiment.args,
            t0=experiment.t0,
            doses=experiment.doses,
            jumps=experiment.jumps,
            throw=throw,
        )

    def initial_state(self, covariates: PyTree[Any]) -> PyTree[Array]:
        """The state at t0, of a model of one subject."""
        if _is_function(self.start):
            return self.start(self.parameters(), covariates)
        return physical(self.start)

    def parameters(self) -> PyTree[Array] | None:
        """Those of the ode in physical units; None where it has none."""
        read = getattr(self.ode, "physical_parameters", None)
        return None if read is None else read()

    def sample(
        self, experiment: Experiments, *, key: PRNGKeyArray
    ) -> Float[Array, "times channels"]:
        """What could be measured at the times of one experiment."""
        return self.errors.sample(self(experiment), key)


_WANTED = {
    "ode": "a model that is solved from a state, such as nde.HybridODE(known, None, parameters)",
    "errors": "a law, such as nde.measured.Gaussian(0.1)",
}


def _is_function(start: Any) -> bool:
    return callable(start) and not isinstance(start, AbstractParameter)

"""What every model of a differential equation has: its numerics, as fields.

A model is a final `equinox.Module`. It maps one example to its output, `jax.vmap` is the batch, and a
model that draws takes `key=`, last and by keyword. A family of models gives the terms of its equation
and says what is saved; `nde._solve` does the rest.
"""

import diffrax
import equinox as eqx

from nde._inputs import check_numerics
from nde.solvers import DiscreteAdjoint


class AbstractModel(eqx.Module):
    """The numerics of a model.

    Args:
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step (every step, with `diffrax.ConstantStepSize`), in the unit of the times; `None`
            lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.
    """

    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Tsit5(), kw_only=True)
    stepsize_controller: diffrax.AbstractStepSizeController = eqx.field(
        default=diffrax.PIDController(rtol=1e-3, atol=1e-6), kw_only=True
    )
    adjoint: diffrax.AbstractAdjoint = eqx.field(default=DiscreteAdjoint(), kw_only=True)
    dt0: float | None = eqx.field(default=None, kw_only=True)
    max_steps: int | None = eqx.field(default=4096, kw_only=True)

    def __check_init__(self):
        check_numerics(self)

r"""The neural ordinary differential equation.

    dy/dt = f(t, y, args),    y(ts[0]) = y0,    output y(ts)

With `augment=p` the state is lifted to (y, a), a in R^p, a(ts[0]) = 0, and the output is its y. The
flow of an ODE is a homeomorphism, so in its own dimension it cannot represent x -> -x on a line or
separate nested rings; in a few more it can.

With `initial` and `readout` the state is learned at both ends, and the model is a network whose layers
are steps of a solver: a classifier is its output at the last time.

    (y, a)(ts[0]) = (initial(y0), 0),    output readout((y, a)(ts))

In code:    f -> vector_field    (y, a) -> the state that `vector_field` sees
Not for:    observations where trajectories cross (a second-order or augmented model), noise (an
SDE).
Reference:  Neural Ordinary Differential Equations (2018) | arXiv:1806.07366
            Augmented Neural ODEs (2019) | arXiv:1904.01681
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nde._initial_value import AbstractODE
from nde._inputs import check_callable
from nde._solve import Rates
from nde.solvers.inputs import check_count

__all__ = ["NeuralODE"]


class NeuralODE(AbstractODE):
    """One example in, one trajectory out; `jax.vmap` is the batch. See the module for the equation.

    Args:
        vector_field: `vector_field(t, y, args) -> dy`, shaped like the state:
            `nde.fields.MLPField`, or any function or Module. Its floating arrays are what `nde.fit`
            trains.
        augment: Channels appended to the state, zero at the start and left out of the output. Needs
            a state of shape (channels,); the vector field then sees (channels + augment,).
        initial: `initial(y0) -> y`, a learned lift, before zeros are appended; `None`: y0 itself.
        readout: `readout(y) -> output`, of the whole state, with what was appended; `None`: the state
            without it.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for numerics that can never work, and, at a call, for input that cannot be
            solved.

    Example:
        >>> field = nde.fields.MLPField(2, width=64, depth=2, key=jax.random.key(0))
        >>> model = nde.NeuralODE(field)
        >>> ys = model(ts, y0)                                      # (times,), (2,) -> (times, 2)
        >>> batch = jax.vmap(model, in_axes=(None, 0))(ts, y0s)     # (examples, times, 2)

        A classifier of 64 features in ten classes:

        >>> key_f, key_r = jax.random.split(jax.random.key(0))
        >>> field = nde.fields.MLPField(64, width=64, depth=1, time=True, key=key_f)
        >>> model = nde.NeuralODE(field, readout=eqx.nn.Linear(64, 10, key=key_r))
        >>> logits = model(jnp.array([0.0, 1.0]), x)[-1]            # (64,) -> (10,)
    """

    vector_field: Callable
    augment: int = eqx.field(default=0, kw_only=True, static=True)
    initial: Callable | None = eqx.field(default=None, kw_only=True)
    readout: Callable | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        check_count("augment", self.augment, ", the number of channels", least=0)
        if self.initial is not None:
            check_callable("initial", self.initial, "(y0)")
        if self.readout is not None:
            check_callable("readout", self.readout, "(y)")

    def terms(self) -> diffrax.ODETerm:
        """dy/dt = f(t, y, args)."""
        return diffrax.ODETerm(Rates(self.vector_field))

    def lift(
        self, t: Array, y0: PyTree[Float[Array, "..."]], args: PyTree[Any]
    ) -> PyTree[Float[Array, "..."]]:
        """The state at the first time: y0, lifted, with the appended channels."""
        if self.initial is not None:
            shapes = jax.tree.map(jnp.shape, y0)
            try:
                y0 = self.initial(y0)
            except (TypeError, IndexError) as error:
                raise ValueError(
                    f"`initial` cannot be applied to `y0` = {shapes}: {str(error).splitlines()[0]} "
                    "One call takes one example; use jax.vmap over the batch."
                ) from error
            y0 = jax.tree.map(lambda leaf: jnp.asarray(leaf, t.dtype), y0)
        if not self.augment:
            return y0
        if not eqx.is_array(y0) or jnp.ndim(y0) != 1:
            shapes = jax.tree.map(jnp.shape, y0)
            raise ValueError(f"`y0` is {shapes}; `augment` needs one array of shape (channels,).")
        return jnp.pad(y0, (0, self.augment))

    def read(self, t: Array, y: PyTree[Float[Array, "..."]], args: PyTree[Any]) -> PyTree[Array]:
        """The readout of the state, or the state without the appended channels."""
        if self.readout is not None:
            return self.readout(y)
        return y[: -self.augment] if self.augment else y

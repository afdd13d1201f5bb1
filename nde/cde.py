r"""The neural controlled differential equation: a recurrent network in continuous time.

    dz = F(z, args) dX,        z(t0) = zeta(X(t0)),        output l(z(t))

driven by a path X through an irregular series, F(z) a matrix of shape (hidden, channels). The
equation sees increments of X alone, hence the first value enters by zeta. With several layers the
state of one drives the next,

    dz_1 = F_1(z_1) dX,    dz_k = F_k(z_k) dz_{k-1},    z_k(t0) = zeta_k(z_{k-1}(t0)),

all solved together, and l reads the last one.

The default takes equal steps from knot to knot: no step is rejected, no lane of a batch waits for
another. They are part of the model. See by more of them, or by adaptive ones
(`steps_per_interval=None, solver=diffrax.Tsit5()`), whether it still does the same.

In code:    F -> vector_field, zeta -> initial, l -> readout, X -> control (a path of `nde.paths`)
Needs:      an F that is bounded, such as `nde.fields.MatrixField`; otherwise the state escapes.
Not for:    long series with fast channels: `LogNeuralCDE` takes a step per window.
Reference:  Neural controlled differential equations for irregular time series (2020) |
            arXiv:2005.08926
"""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nde._controlled import AbstractCDE, check_control, initial_of, solve_cde
from nde._inputs import check_callable
from nde.paths import AbstractControl

__all__ = ["NeuralCDE"]


class NeuralCDE(AbstractCDE):
    """One path in, one output out; `jax.vmap` over paths is the batch. See the module for the
    equation.

    Args:
        vector_field: `vector_field(t, z, args) -> (hidden, channels)`, such as
            `nde.fields.MatrixField`; or one per layer.
        initial: `initial(x) -> z`, from the first value of the path, time included, shape
            (channels,), to shape (hidden,); or one per layer.
        readout: `readout(z) -> output`, of any shape.
        causal: Whether to refuse paths that look ahead: for outputs along the series that must not
            know its future.
        steps_per_interval: Steps of equal length from each knot of the path to the next; `None`
            leaves the steps to `stepsize_controller`, and ends one at each knot where the
            derivative of the path jumps.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of the times; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve, for steps that the controller
            chooses.

    Raises:
        ValueError: for numerics that can never work, and, at a call, for a path that does not fit
            the model.

    Example:
        >>> key_f, key_i, key_r = jax.random.split(jax.random.key(0), 3)
        >>> field = nde.fields.MatrixField(8, 3, width=64, depth=1, key=key_f)
        >>> initial = eqx.nn.MLP(3, 8, 64, 1, key=key_i)
        >>> model = nde.NeuralCDE(field, initial, eqx.nn.Linear(8, 1, key=key_r))
        >>> paths = jax.vmap(nde.paths.hermite_cubic)(ts, ys)   # (series, times), (..., 2)
        >>> logits = jax.vmap(model)(paths)                     # (series, 1)
    """

    vector_field: Callable | Sequence[Callable]
    initial: Callable | Sequence[Callable]
    readout: Callable = lambda z: z
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Heun(), kw_only=True)

    def __check_init__(self):
        fields, initials = self._layers()
        if len(fields) != len(initials) or not fields:
            raise ValueError(
                f"`vector_field` has {len(fields)} layers but `initial` has {len(initials)}; give "
                "one of each per layer."
            )
        for field, initial in zip(fields, initials, strict=True):
            check_callable("vector_field", field, "(t, z, args)")
            check_callable("initial", initial, "(x)")
        check_callable("readout", self.readout, "(z)")

    def matrix(self, control: AbstractControl) -> Callable:
        """The vector field of all layers together, `matrix(t, z, args) -> (state, channels)`."""
        fields, _ = self._layers()
        if len(fields) == 1:
            return fields[0]
        sizes = self._sizes(control)
        return Stacked(fields, tuple(sum(sizes[:k]) for k in range(1, len(sizes))))

    def initial_state(self, x: Float[Array, " channels"]) -> Float[Array, " state"]:
        """The hidden states of all layers at the first value of a path, `path.start`."""
        return jnp.concatenate(self._initial_states(x))

    def continue_from(
        self, z: Float[Array, " state"], control: AbstractControl, args: PyTree[Any] = None
    ) -> Float[Array, " state"]:
        """The hidden states at the end of a path, from those at its beginning.

        For a series that arrives while it is used: one call per observation, with the paths of a
        `nde.paths.Stream`. With `steps_per_interval` and a one-step solver the states are those of
        the whole series.
        """
        check_control(control, self.causal)
        states: Any = solve_cde(self, control, z, None, args, throw=True).ys
        return states[-1]

    def read(self, z: Float[Array, " state"], control: AbstractControl) -> PyTree[Array]:
        """The output of hidden states: `readout` of the last layer."""
        return self.readout(z[z.shape[0] - self._sizes(control)[-1] :])

    def _layers(self) -> tuple[tuple[Callable, ...], tuple[Callable, ...]]:
        def several(part: Any) -> tuple[Callable, ...]:
            return tuple(part) if isinstance(part, tuple | list) else (part,)

        return several(self.vector_field), several(self.initial)

    def _initial_states(self, x: Float[Array, " channels"]) -> list[Float[Array, " hidden"]]:
        states = []
        for initial in self._layers()[1]:
            x = initial_of(initial, x)
            states.append(x)
        return states

    def _sizes(self, control: AbstractControl) -> list[int]:
        return [z.shape[0] for z in eqx.filter_eval_shape(self._initial_states, control.start)]


class Stacked(eqx.Module):
    """The fields of several layers as one: the state of each drives the next."""

    fields: tuple[Callable, ...]
    ends: tuple[int, ...] = eqx.field(static=True)  # of all layers but the last, in the state

    def __call__(
        self, t: Float[Array, ""], z: Float[Array, " state"], args: PyTree[Any]
    ) -> Float[Array, "state channels"]:
        """A row per entry of the state, a column per channel of the path."""
        rows = []
        for field, part in zip(self.fields, jnp.split(z, self.ends), strict=True):
            rows.append(field(t, part, args) @ rows[-1] if rows else field(t, part, args))
        return jnp.concatenate(rows)

r"""Neural vector fields: small networks that give dy/dt.

    f(t, y, c) = s * tanh(W_L phi(... phi(W_1 [y, t, c] + b_1) ...) + b_L)

with a learned scale `s` and a smooth `phi`. The final tanh bounds the rate of change, so that no
initial state can escape to infinity; `s` sets the largest rate. A smooth `phi` matters: a kink
(relu) costs the solver its order.

Scale what goes in: states, times and context of order one. Where the rates exceed `s`, raise it: a
saturated tanh does not learn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde._inputs import check_callable, check_key
from nde.solvers.inputs import check_count

__all__ = [
    "Batched",
    "DepthVarying",
    "GRUField",
    "Legendre",
    "MLPField",
    "MatrixField",
    "OwnNoise",
    "Pieces",
    "ScalarField",
]


class MLPField(eqx.Module):
    r"""A multilayer perceptron as a vector field, `field(t, y, args) -> dy`. See the module for the
    equation.

    Args:
        size: Channels of the state, shape (size,).
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        out_size: Channels of the output, shape (out_size,); `None` is `size`, a vector field.
            Another number makes the network a term inside known equations (see `nde.HybridODE`).
        time: Whether t is an input. Scale the times of the data to order one.
        context: Channels of `args`, an array of shape (context,) that is an input; with 0
            there must be none.
        activation: Of the hidden layers. Smooth.
        final_activation: Of the output, before the scale.
        scale: Initial value of the learned scale, a number or an array of shape (out_size,).
        last_layer_scale: Factor on the initial weights of the last layer. With 0 the field starts
            as exactly zero and still learns: the start for a correction to known equations.
        key: Of the initial weights.

    Raises:
        ValueError: for sizes, activations or a `key` that cannot be used, and, at a call, for a state
            or context of another shape.
    """

    mlp: eqx.nn.MLP
    scale: Float[Array, "..."]
    size: int = eqx.field(static=True)
    time: bool = eqx.field(static=True)
    context: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        width: int,
        depth: int,
        *,
        out_size: int | None = None,
        time: bool = False,
        context: int = 0,
        activation: Callable = jax.nn.softplus,
        final_activation: Callable = jnp.tanh,
        scale: float | Float[Array, " out_size"] = 1.0,
        last_layer_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_key(key)
        check_callable("activation", activation, "(x)")
        check_callable("final_activation", final_activation, "(x)")
        out_size = size if out_size is None else out_size
        counts = {"size": size, "out_size": out_size, "width": width if depth else 1}
        for name, count in counts.items():
            check_count(name, count)
        for name, count in (("depth", depth), ("context", context)):
            check_count(name, count, least=0)
        mlp = eqx.nn.MLP(
            size + time + context, out_size, width, depth, activation, final_activation, key=key
        )
        last = jax.tree.map(
            lambda leaf: last_layer_scale * leaf, eqx.filter(mlp.layers[-1], eqx.is_array)
        )
        last = eqx.combine(last, mlp.layers[-1])
        self.mlp = eqx.tree_at(lambda mlp: mlp.layers[-1], mlp, last)
        self.scale = jnp.asarray(scale, dtype=last.weight.dtype)
        self.size = size
        self.time = time
        self.context = context
        if self.scale.shape not in ((), (out_size,)):
            raise ValueError(
                f"`scale` has shape {self.scale.shape}; it is a number, or an array of shape "
                f"({out_size},)."
            )

    def __call__(
        self,
        t: Float[Array, ""],
        y: Float[Array, " size"],
        args: Float[Array, " context"] | None = None,
    ) -> Float[Array, " out_size"]:
        """The rate of change at time `t` and state `y`, shape (size,), in the context `args`."""
        if args is not None and not self.context:
            raise ValueError(
                "`args` was given, but this MLPField takes no context and would never see it. Make it "
                "with `context`, the number of entries of `args`, or leave `args` out."
            )
        inputs = [self._checked("y0", y, self.size)]
        if self.time:
            inputs.append(jnp.asarray(t, dtype=y.dtype)[None])
        if self.context:
            inputs.append(self._checked("args", args, self.context))
        return self.scale * self.mlp(jnp.concatenate(inputs))

    def _checked(self, name: str, value: Array | None, size: int) -> Array:
        shape = getattr(value, "shape", type(value).__name__)
        if value is None or shape != (size,):
            raise ValueError(
                f"`{name}` has shape {shape} but the field expects ({size},): one example, and "
                "time is not a channel of it. "
                "Use jax.vmap over a batch, or make the field with another `size` or `context`."
            )
        return value


class MatrixField(eqx.Module):
    """A multilayer perceptron as the vector field of a controlled equation,
    `field(t, z, args) -> (size, channels)`: an `MLPField` whose output is a matrix.

    Args:
        size: Entries of the hidden state, shape (size,).
        channels: Channels of the control path; with its time and counts.
        width, depth, key: As in `MLPField`.
        options: Of `MLPField`: `time`, `context`, `activation`, `final_activation`, `scale`.

    Raises:
        ValueError: as `MLPField`.
    """

    field: MLPField
    channels: int = eqx.field(static=True)

    def __init__(
        self, size: int, channels: int, width: int, depth: int, *, key: PRNGKeyArray, **options
    ):
        self.field = MLPField(size, width, depth, out_size=size * channels, key=key, **options)
        self.channels = channels

    def __call__(
        self,
        t: Float[Array, ""],
        z: Float[Array, " size"],
        args: Float[Array, " context"] | None = None,
    ) -> Float[Array, "size channels"]:
        """How the state moves with each channel of the control."""
        return self.field(t, z, args).reshape(self.field.size, self.channels)


class ScalarField(eqx.Module):
    """A multilayer perceptron as a function of the state, `field(t, x, args) -> scalar`: an energy, a
    potential. Unbounded: an `MLPField` with one output and no final tanh.

    Args:
        size: Entries of the state, shape (size,).
        width, depth, key: As in `MLPField`.
        options: Of `MLPField`: `time`, `context`, `activation`, `scale`, `last_layer_scale`.

    Raises:
        ValueError: as `MLPField`.
    """

    field: MLPField

    def __init__(self, size: int, width: int, depth: int, *, key: PRNGKeyArray, **options: Any):
        unbounded = {"out_size": 1, "final_activation": _same}
        self.field = MLPField(size, width, depth, key=key, **(unbounded | options))

    def __call__(
        self,
        t: Float[Array, ""],
        x: Float[Array, " size"],
        args: Float[Array, " context"] | None = None,
    ) -> Float[Array, ""]:
        """The value at time `t` and state `x`."""
        return self.field(t, x, args)[0]


class Batched(eqx.Module):
    """A field of one example as the field of a batch that is solved as one state.

    Every example then takes the same steps, whose error is that of the whole batch: fewer and larger
    operations than `jax.vmap` of the model, and as many steps as the hardest example asks for.

    Args:
        field: `field(t, y, args) -> dy` of one example; `hybrid.vector_field` of a `HybridODE`.

    Raises:
        ValueError: at a call, for a state or `args` without one entry per example.

    Example:
        >>> model = nde.NeuralODE(nde.fields.Batched(field))
        >>> ys = model(ts, y0s)             # (times,), (examples, channels) -> (times, examples, ...)
    """

    field: Callable

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, "examples ..."], args: Array | None = None
    ) -> Float[Array, "examples ..."]:
        """The rates of change, shaped like `y`. `args`: None, or with a leading example axis."""
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves((y, args))]
        if any(shape[:1] != shapes[0][:1] or shape == () for shape in shapes):
            raise ValueError(
                f"`y0` and `args` of a Batched field have shapes {shapes}; each has a leading axis of "
                "the same length, one entry per example."
            )
        axes = (None, 0, None if args is None else 0)
        return jax.vmap(self.field, in_axes=axes)(t, y, args)


class DepthVarying(eqx.Module):
    r"""A field whose parameters change with time, as the layers of a network differ.

        theta(t) = sum_k phi_k(t) theta_k

    Args:
        fields: theta_1 to theta_K: fields of one structure, `field(t, y, args) -> dy`.
        basis: `basis(t)`, shape (K,), the values phi_k(t): `Pieces` or `Legendre`.

    Raises:
        ValueError: for no fields, or fields of different structure.

    Each evaluation mixes K sets of parameters, and with `jax.vmap` and adaptive steps it does so for
    every example: for small networks, or steps that a batch shares.

    Reference:
        Dissecting neural ODEs (2020) | arXiv:2002.08071

    Example:
        >>> make = lambda key: nde.fields.MLPField(4, 32, 1, key=key)
        >>> parts = [make(key) for key in jax.random.split(key, 3)]
        >>> blocks = nde.fields.DepthVarying(parts, nde.fields.Pieces(1 / 3, 2 / 3))
        >>> galerkin = nde.fields.DepthVarying(parts, nde.fields.Legendre(3))
    """

    parameters: PyTree[Float[Array, "parts ..."]]
    structure: PyTree[Any]
    basis: Callable

    def __init__(self, fields: Sequence[Callable], basis: Callable):
        check_callable("basis", basis, "(t)")
        if len(fields) == 0:
            raise ValueError("`fields` is empty; give one field for each function of the basis.")
        split = [eqx.partition(field, eqx.is_inexact_array) for field in fields]
        shapes = [jax.tree.map(jnp.shape, arrays) for arrays, _ in split]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"`fields[{number}]` has other parameters than `fields[0]`: {shape} and {shapes[0]}; "
                    "the fields are sets of parameters of one network."
                )
        count = eqx.filter_eval_shape(basis, jnp.zeros(())).shape
        if count != (len(fields),):
            raise ValueError(
                f"`basis` has values of shape {count} but there are {len(fields)} `fields`; give one for "
                "each function of the basis."
            )
        self.parameters = jax.tree.map(lambda *x: jnp.stack(x), *(arrays for arrays, _ in split))
        self.structure = split[0][1]
        self.basis = basis

    def __call__(self, t: Float[Array, ""], y: Float[Array, " size"], args: Any = None) -> Array:
        """The rate of change at time `t` and state `y`, shape (size,)."""
        weights = self.basis(t)
        mix = lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1)
        return eqx.combine(jax.tree.map(mix, self.parameters), self.structure)(t, y, args)


class Pieces(eqx.Module):
    """The basis of parameters that are constant in pieces: 1 for the piece that t is in, 0 for others.

    The field jumps at the ends, where a step should end:
    `diffrax.ClipStepSizeController(controller, jump_ts=jnp.array(ends))`, or equal steps that do.

    Args:
        ends: Times at which a piece ends and the next begins, increasing: one less than pieces.
    """

    ends: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, *ends: float):
        self.ends = ends
        if list(ends) != sorted(set(ends)):
            raise ValueError(f"`ends` is {ends}; the ends of the pieces increase.")

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " parts"]:
        """The values at `t`, shape (parts,)."""
        t = jnp.asarray(t)
        piece = jnp.searchsorted(jnp.asarray(self.ends, t.dtype), t, side="right")
        return jax.nn.one_hot(piece, len(self.ends) + 1, dtype=t.dtype)


class Legendre(eqx.Module):
    """The basis of Legendre polynomials on [0, 1]: 1, 2t - 1, and so on.

    Args:
        count: How many: the largest degree plus one.
    """

    count: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("count", self.count)

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " parts"]:
        """The values at `t`, shape (parts,)."""
        x = 2 * jnp.asarray(t) - 1
        values = [jnp.ones_like(x), x]
        for n in range(1, self.count - 1):
            values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
        return jnp.stack(values[: self.count])


class GRUField(eqx.Module):
    r"""A gated recurrent unit in continuous time, `field(t, h, args) -> dh`.

        dh/dt = (1 - z) (g - h),    z = sigmoid(W_z h + b_z),    r = sigmoid(W_r h + b_r),
                                    g = tanh(W_g (r h) + b_g)

    Each rate points into [-1, 1], so a state that starts there stays there for ever, and no rate is
    larger than 2.

    Args:
        size: Entries of the state, shape (size,).
        key: Of the initial weights.

    Raises:
        ValueError: for a size or a `key` that cannot be used.

    Reference:
        GRU-ODE-Bayes: continuous modeling of sporadically-observed time series (2019)
        | arXiv:1905.12374
    """

    gates: eqx.nn.Linear
    candidate: eqx.nn.Linear

    def __init__(self, size: int, *, key: PRNGKeyArray):
        check_key(key)
        check_count("size", size)
        key_gates, key_candidate = jax.random.split(key)
        self.gates = eqx.nn.Linear(size, 2 * size, key=key_gates)
        self.candidate = eqx.nn.Linear(size, size, key=key_candidate)

    def __call__(
        self, t: Float[Array, ""], h: Float[Array, " size"], args: Any = None
    ) -> Float[Array, " size"]:
        """The rate of change at state `h`, shape (size,)."""
        del t, args
        z, r = jnp.split(jax.nn.sigmoid(self.gates(h)), 2)
        return (1 - z) * (jnp.tanh(self.candidate(r * h)) - h)


class OwnNoise(eqx.Module):
    r"""A diagonal diffusion, the noise of each component a small network of that component alone.

        sigma_i(t, y) = least + (most - least) sigmoid(net_i(y_i))

    Bounded below, so that the path divergence of `nde.LatentSDE` exists; and each noise depends on its
    own component, as `nde.solvers.SOSRI` needs for its order.

    Args:
        size: Components.
        width: Units of the one hidden layer of each network.
        least: Lower bound, positive.
        most: Upper bound.
        activation: Of the hidden layer. Smooth.
        key: Of the initial weights.

    Raises:
        ValueError: for sizes, bounds or a `key` that cannot be used.
    """

    nets: eqx.nn.MLP
    least: float = eqx.field(static=True)
    most: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        width: int,
        *,
        least: float,
        most: float,
        activation: Callable = jax.nn.softplus,
        key: PRNGKeyArray,
    ):
        check_key(key)
        check_callable("activation", activation, "(x)")
        for name, count in (("size", size), ("width", width)):
            check_count(name, count)
        if not 0 < least < most:
            raise ValueError(
                f"`least` is {least} and `most` {most}; the noise stays between two bounds, 0 < least < "
                "most."
            )
        make = lambda key: eqx.nn.MLP("scalar", "scalar", width, 1, activation, key=key)
        self.nets = eqx.filter_vmap(make)(jax.random.split(key, size))
        self.least, self.most = least, most

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " size"], args: Array | None = None
    ) -> Float[Array, " size"]:
        """The standard deviations per root of time at state `y`, shape (size,)."""
        del t, args
        outputs = eqx.filter_vmap(lambda net, y: net(y))(self.nets, y)
        return self.least + (self.most - self.least) * jax.nn.sigmoid(outputs)


def _same(x: Array) -> Array:
    return x

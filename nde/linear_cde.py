r"""The structured linear controlled differential equation: a CDE without a loop over a network.

    dh = sum_i A_i h dw^i,        h(t_0) = zeta(x_0),

linear in the state, so that one interval of the data is one matrix and the series a product:

    h_k = M_k h_(k-1),    M_k = step(B_k),    B_k = sum_i A_i dw_k^i.

The A_i share a block-diagonal structure: blocks of size 1 (diagonal), b, or the whole state
(dense). All M_k are made at once; what remains in order is the recurrence of `nde._recurrence`.

Driver      w = (t, x) (`differences`: dw = (dt, dx), a CDE), or w = int (1, x) dt (`integral`:
            dw = dt (1, x_k), for tokens and rates). Where time stands still, as in padding by
            repetition, `integral` gives dw = 0, and so does `differences` if x repeats too.
Step        `first_order`: M = 1 + B. `exponential`: M = exp(B), exact for a path linear in
            between.
Layer       v = norm(skip(x) + h),  x' = v + (U v) * sigmoid(G v);  the next layer is driven by x'.

What a layer can compute depends on the structure. Diagonal matrices commute: a diagonal layer
forgets the order of its input. With `exponential` a real diagonal has positive entries, hence no
parity, which needs a sign: `first_order` has it where A dw < -1 (the entry is -1 at -2), and a
block of 2 has it as a rotation by pi. A sign is right for any negative entry; the error of an angle
adds up over long words. The rotations of an icosahedron (the group A5) need blocks of at least 3.

In code:    A_i -> generators of shape (driver channels, block, block, blocks), lanes last
Cost:       hidden * block per time and driver channel for the B_k, hidden * block for the rest.
Not for:    a state that must stay bounded: products grow. Scale the data to order one.
Reference:  Structured linear CDEs: maximally expressive and parallel-in-time sequence models
            (2025) | arXiv:2505.17761
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nde._protocol import check_callable, check_key, check_times
from nde._recurrence import by_platform, product

__all__ = ["LinearCDE", "differences", "exponential", "first_order", "integral"]


def differences(
    ts: Float[Array, " times"], xs: Float[Array, "times channels"]
) -> Float[Array, "intervals channels+1"]:
    """Increments of the path (t, x): the driver of a CDE, which does not see where x is."""
    return jnp.diff(jnp.concatenate([ts[:, None], xs], axis=1), axis=0)


def integral(
    ts: Float[Array, " times"], xs: Float[Array, "times channels"]
) -> Float[Array, "intervals channels+1"]:
    """Increments of the integral of (1, x), each interval with the value at its end: causal."""
    dt = jnp.diff(ts)[:, None]
    return jnp.concatenate([dt, dt * xs[1:]], axis=1)


def first_order(
    generator: Float[Array, "intervals block block blocks"],
) -> Float[Array, "intervals block block blocks"]:
    """1 + B: cheap; can reflect, and can be singular."""
    return jnp.eye(generator.shape[1], dtype=generator.dtype)[None, :, :, None] + generator


@jax.checkpoint  # a dozen matrices per interval would otherwise wait for the backward pass
def exponential(
    generator: Float[Array, "intervals block block blocks"],
) -> Float[Array, "intervals block block blocks"]:
    """exp(B): invertible whatever B is. Accurate to rounding in float64 up to a norm of B of 12; the
    series, of B / 32, leaves out (norm / 32)^13 / 13!.
    """
    if generator.shape[1] == 1:
        return jnp.exp(generator)
    squarings = 5
    x = generator / 2**squarings
    x2 = product(x, x)
    x3, x4 = product(x2, x), product(x2, x2)
    powers = (x, x2, x3, x4)
    # Taylor's series of exp(x) - 1 up to x^12, in x^4 (Paterson and Stockmeyer).
    weights = 1 / np.cumprod(np.arange(1.0, 13.0))
    parts: Any = [
        sum(float(w) * power for w, power in zip(row, powers, strict=True))
        for row in weights.reshape(3, 4)
    ]
    low, middle, high = parts
    rest = low + product(x4, middle + product(x4, high))
    # exp(2x) - 1 = 2e + e^2 with e = exp(x) - 1: nothing is lost where x is small.
    for _ in range(squarings):
        rest = 2 * rest + product(rest, rest)
    return first_order(rest)


class Layer(eqx.Module):
    """One linear CDE and the nonlinear mixing after it; see the module for the equations."""

    generators: Float[Array, "driver block block blocks"]
    initial: eqx.nn.Linear
    skip: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    mix: eqx.nn.Linear
    driver: Callable
    step: Callable
    recurrence: Callable

    def __init__(self, channels, hidden, block, init_std, driver, step, recurrence, key):
        keys = jax.random.split(key, 4)
        shape = (channels + 1, block, block, hidden // block)
        deviation = init_std / np.sqrt(block)
        self.generators = float(deviation) * jax.random.normal(keys[0], shape)
        self.initial = eqx.nn.Linear(channels, hidden, key=keys[1])
        self.skip = eqx.nn.Linear(channels, hidden, key=keys[2])
        self.norm = eqx.nn.LayerNorm(hidden)
        self.mix = eqx.nn.Linear(hidden, 2 * hidden, key=keys[3])
        self.driver, self.step, self.recurrence = driver, step, recurrence

    def states(
        self, ts: Float[Array, " times"], xs: Float[Array, "times channels"]
    ) -> Float[Array, "times hidden"]:
        """h at `ts`: the linear CDE alone."""
        _, block, _, blocks = self.generators.shape
        start = self.initial(xs[0])
        increments = self.driver(ts, xs)
        matrices = self.step(jnp.tensordot(increments, self.generators, axes=1))
        still = jnp.zeros((increments.shape[0], block, blocks), dtype=start.dtype)
        hs = self.recurrence(matrices, still, start.reshape(block, blocks))
        return jnp.concatenate([start[None], hs.reshape(-1, block * blocks)])

    def __call__(
        self, ts: Float[Array, " times"], xs: Float[Array, "times channels"]
    ) -> Float[Array, "times hidden"]:
        """x' at `ts`: what drives the next layer."""

        def mixed(x, h):
            v = self.norm(self.skip(x) + h)
            value, gate = jnp.split(self.mix(v), 2)
            return v + value * jax.nn.sigmoid(gate)

        return jax.vmap(mixed)(xs, self.states(ts, xs))


class LinearCDE(eqx.Module):
    """One series in, one output out; `jax.vmap` over series is the batch. See the module for the
    equations.

    Args:
        channels: Channels of the data; time is added.
        hidden: Entries of the state of each layer.
        out_size: Channels of the output.
        block: Size of the blocks, a divisor of `hidden`: 1 is diagonal, `hidden` is dense.
        depth: Number of layers.
        driver: What drives a layer: `differences` or `integral`, or any
            `driver(ts, xs) -> increments` with shapes (times,), (times, channels) and
            (times - 1, channels + 1).
        step: From generators to matrices: `first_order` or `exponential`.
        recurrence: How the product is taken, of `nde._recurrence`: in order on a CPU, by an
            associative scan elsewhere.
        init_std: Spread of the initial generators; that of an entry is `init_std / sqrt(block)`.
        key: Of the initial weights.

    Raises:
        ValueError: for sizes that do not fit, and, at a call, for a series that does not.

    Example:
        >>> model = nde.LinearCDE(2, 64, 10, key=jax.random.key(0))
        >>> logits = jax.vmap(model)(ts, ys)                    # (series, times, 2) -> (series, 10)
        >>> online = jax.vmap(model.trajectory)(ts, ys)         # (series, times, 10)
    """

    layers: tuple[Layer, ...]
    readout: eqx.nn.Linear
    channels: int = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        hidden: int,
        out_size: int,
        *,
        block: int = 4,
        depth: int = 2,
        driver: Callable = differences,
        step: Callable = first_order,
        recurrence: Callable = by_platform,
        init_std: float = 0.5,
        key: PRNGKeyArray,
    ):
        check_key(key)
        sizes = {"channels": channels, "hidden": hidden, "out_size": out_size}
        for name, value in (sizes | {"block": block, "depth": depth}).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer >= 1.")
        if hidden % block:
            fits = [size for size in range(1, hidden + 1) if hidden % size == 0]
            raise ValueError(
                f"`block` is {block}, which does not divide `hidden` = {hidden}; give one of {fits}."
            )
        check_callable("driver", driver, "(ts, xs)")
        check_callable("step", step, "(generator)")
        check_callable("recurrence", recurrence, "(matrices, offsets, start)")
        *layer_keys, readout_key = jax.random.split(key, depth + 1)
        self.layers = tuple(
            Layer(size, hidden, block, init_std, driver, step, recurrence, layer_key)
            for size, layer_key in zip([channels] + [hidden] * (depth - 1), layer_keys, strict=True)
        )
        self.readout = eqx.nn.Linear(hidden, out_size, key=readout_key)
        self.channels = channels

    def __call__(
        self, ts: Float[Array, " times"], ys: Float[Array, "times channels"]
    ) -> Float[Array, " out_size"]:
        """The output at the end of the series.

        Args:
            ts: Times, shape (times,), at least two, not decreasing. A series that ends early
                repeats its last time and value: the output does not change.
            ys: Values at `ts`, without gaps.

        Raises:
            ValueError: if the series does not fit the model, or is not finite or not in order.
        """
        return self.readout(self._features(ts, ys)[-1])

    def trajectory(
        self, ts: Float[Array, " times"], ys: Float[Array, "times channels"]
    ) -> Float[Array, "times out_size"]:
        """The outputs at `ts`; each depends on the series up to its time alone."""
        return jax.vmap(self.readout)(self._features(ts, ys))

    def _features(self, ts: Array, ys: Array) -> Float[Array, "times hidden"]:
        check_series(ts, ys, self.channels)
        dtype = self.readout.weight.dtype
        # Times are made relative before they lose precision.
        ts, xs = (ts - ts[0]).astype(dtype), ys.astype(dtype)
        for layer in self.layers:
            xs = layer(ts, xs)
        return xs


def check_series(ts: Array, ys: Array, channels: int) -> None:
    """One series of at least two finite rows of `channels` values, in order."""
    check_times(ts, None)
    if ts.shape[0] < 2:
        raise ValueError(
            "`ts` has one time; a linear CDE is driven by increments, so give at least two rows. "
            "Repeat the row for the output at its time."
        )
    if not eqx.is_array(ys) or not jnp.issubdtype(ys.dtype, jnp.floating):
        kind = ys.dtype if eqx.is_array(ys) else type(ys).__name__
        raise ValueError(f"`ys` is {kind}; pass a floating array: jnp.asarray(ys, dtype=float).")
    if ys.shape != (ts.shape[0], channels):
        raise ValueError(
            f"`ys` has shape {ys.shape} but the model expects {(ts.shape[0], channels)}: one row "
            "per time, without the time. Use jax.vmap over the batch, or make the model with "
            "another `channels`."
        )
    # NumPy reads the ends: under `jit` even a slice of a known array is not known.
    if not isinstance(ts, jax.core.Tracer) and np.asarray(ts)[-1] < np.asarray(ts)[0]:
        raise ValueError(
            f"`ts` runs backward, from {ts[0]} to {ts[-1]}; reverse it (and the data with it)."
        )
    if not isinstance(ys, jax.core.Tracer) and not np.isfinite(np.asarray(ys)).all():
        row, channel = (int(i) for i in np.argwhere(~np.isfinite(np.asarray(ys)))[0])
        raise ValueError(
            f"`ys` is {ys[row, channel]} at time {row}, channel {channel}; fill gaps first, by the "
            "last value or by interpolation."
        )

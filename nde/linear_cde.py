r"""The structured linear controlled differential equation: a CDE without a loop over a network.

    dh = sum_i A_i h dw^i,        h(t_0) = zeta(x_0),

linear in the state, so that one interval of the data is one matrix and the series a product:

    h_k = M_k h_(k-1),    M_k = 1 + step(B_k),    B_k = sum_i A_i dw_k^i.

The A_i share a block-diagonal structure: blocks of size 1 (diagonal), b, or the whole state
(dense). `nde._recurrence` takes the product.

Driver      w = (t, x) (`differences`: dw = (dt, dx), a CDE), or w = int (1, x) dt (`integral`:
            dw = dt (1, x_k), for tokens and rates). Where time stands still, as in padding by
            repetition, `integral` gives dw = 0, and so does `differences` if x repeats too.
Step        `first_order`: M = 1 + B. `exponential`: M = exp(B), exact for a path linear in
            between. `orthogonal`: M = exp(B - B^T), a rotation: h keeps its norm.
Layer       v = norm(skip(x) + h),  x' = v + (U v) * sigmoid(G v);  the next layer is driven by x'.

What a layer can compute depends on the structure. Diagonal matrices commute: a diagonal layer
forgets the order of its input. With `exponential` a real diagonal has positive entries, hence no
parity, which needs a sign: `first_order` has it where A dw < -1 (the entry is -1 at -2), and a
block of 2 has it as a rotation by pi (`orthogonal`). A sign is right for any negative entry; the
error of an angle adds up over long words, so train it with a loss that has its minimum at the exact
angle (smoothed labels). The rotations of an icosahedron (the group A5) need blocks of at least 3.

In code:    A_i -> generators of shape (driver channels, block, block, blocks), lanes last
Cost:       hidden * block per time and driver channel for the B_k, hidden * block for the rest;
            `exponential` and `orthogonal` add 16 products of blocks per time, hidden * block^2 each.
            Outputs at all times cost the mixing at all times, like layers below another.
Not for:    long series with `first_order` or `exponential` and data that is not small: products
            grow or vanish. Scale the data to order one, or take `orthogonal`.
Reference:  Structured linear CDEs: maximally expressive and parallel-in-time sequence models
            (2025) | arXiv:2505.17761
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nde._inputs import check_callable, check_key, check_times
from nde._recurrence import by_platform, in_chunks, in_order, product
from nde.solvers.inputs import check_count, is_traced

__all__ = [
    "LinearCDE",
    "by_platform",
    "differences",
    "exponential",
    "first_order",
    "in_chunks",
    "in_order",
    "integral",
    "orthogonal",
]


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
    generator: Float[Array, "block block *lanes"],
) -> Float[Array, "block block *lanes"]:
    """M = 1 + B: cheap; can reflect, and can be singular."""
    return generator


def exponential(
    generator: Float[Array, "block block *lanes"],
) -> Float[Array, "block block *lanes"]:
    """M = exp(B): invertible whatever B is. Accurate to rounding in float64 up to a norm of B of 12;
    the series, of B / 32, leaves out (norm / 32)^13 / 13!.
    """
    if generator.shape[0] == 1:
        return jnp.expm1(generator)
    squarings, terms = 5, 12
    x = generator / 2**squarings

    # Loops, because the compiler would merge a chain of products and make each many times over.
    def horner(rest: Any, k: Any):
        return (x + product(x, rest)) / k, None

    def square(rest: Any, _: Any):
        # exp(2x) - 1 = 2e + e^2 with e = exp(x) - 1: nothing is lost where x is small.
        return 2 * rest + product(rest, rest), None

    orders = jnp.arange(terms - 1, 0, -1, dtype=x.dtype)
    rest, _ = jax.lax.scan(horner, x / terms, orders)
    return jax.lax.scan(square, rest, length=squarings)[0]


def orthogonal(
    generator: Float[Array, "block block *lanes"],
) -> Float[Array, "block block *lanes"]:
    """M = exp(B - B^T): a rotation, so that products neither grow nor vanish. Angles of order pi need
    an `init_std` of that order.

    Raises:
        ValueError: for blocks of 1, which cannot turn.
    """
    if generator.shape[0] == 1:
        raise ValueError("`orthogonal` turns blocks; a block of 1 cannot turn. Use `block` >= 2.")
    return exponential(generator - jnp.swapaxes(generator, 0, 1))


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

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        block: int,
        init_std: float,
        driver: Callable,
        step: Callable,
        recurrence: Callable,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        shape = (channels + 1, block, block, hidden // block)
        deviation = init_std / np.sqrt(block)
        self.generators = float(deviation) * jax.random.normal(keys[0], shape)
        self.initial = eqx.nn.Linear(channels, hidden, key=keys[1])
        self.skip = eqx.nn.Linear(channels, hidden, key=keys[2])
        self.norm = eqx.nn.LayerNorm(hidden)
        self.mix = eqx.nn.Linear(hidden, 2 * hidden, key=keys[3])
        self.driver = driver
        self.step = step
        self.recurrence = recurrence

    def states(
        self, ts: Float[Array, " times"], xs: Float[Array, "times channels"]
    ) -> Float[Array, "times hidden"]:
        """h at `ts`: the linear CDE alone."""
        end, before = self._solve(ts, xs)
        return jnp.concatenate([before, end[None]]).reshape(ts.shape[0], -1)

    def __call__(
        self, ts: Float[Array, " times"], xs: Float[Array, "times channels"]
    ) -> Float[Array, "times hidden"]:
        """x' at `ts`: what drives the next layer."""
        return jax.vmap(self._mixed)(xs, self.states(ts, xs))

    def last(
        self, ts: Float[Array, " times"], xs: Float[Array, "times channels"]
    ) -> Float[Array, " hidden"]:
        """x' at the last time alone, without the mixing before it."""
        return self._mixed(xs[-1], self._solve(ts, xs)[0].reshape(-1))

    def _solve(self, ts, xs):
        shape = self.generators.shape[2:]
        start = self.initial(xs[0]).reshape(shape)
        return self.recurrence(self.step, self.generators, self.driver(ts, xs), start)

    def _mixed(self, x, h):
        v = self.norm(self.skip(x) + h)
        value, gate = jnp.split(self.mix(v), 2)
        return v + value * jax.nn.sigmoid(gate)


class LinearCDE(eqx.Module):
    """One series in, one output out; `jax.vmap` over series is the batch. See the module for the
    equations. Gradients are in reverse mode, of first order.

    Args:
        channels: Channels of the data; time is added.
        hidden: Entries of the state of each layer.
        out_size: Channels of the output.
        block: Size of the blocks, a divisor of `hidden`: 1 is diagonal, `hidden` is dense.
        depth: Number of layers.
        driver: What drives a layer: `differences` or `integral`, or any
            `driver(ts, xs) -> increments` with shapes (times,), (times, channels) and
            (times - 1, channels + 1).
        step: From a generator B to M - 1: `first_order`, `exponential`, `orthogonal`, or any
            `step(generator)` on matrices in the first two axes of an array, with step(0) = 0.
        recurrence: How the product is taken: `in_order`, `in_chunks` or `by_platform`, the former
            on a CPU and the latter elsewhere. On a CPU `in_chunks` can be faster where the batch is
            small and so are the blocks.
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
            check_count(name, value)
        if hidden % block:
            fits = [size for size in range(1, hidden + 1) if hidden % size == 0]
            raise ValueError(
                f"`block` is {block}, which does not divide `hidden` = {hidden}; give one of {fits}."
            )
        check_callable("driver", driver, "(ts, xs)")
        check_step(step, block)
        check_callable("recurrence", recurrence, "(step, generators, increments, start)")
        *layer_keys, readout_key = jax.random.split(key, depth + 1)
        self.layers = tuple(
            Layer(
                size,
                hidden,
                block=block,
                init_std=init_std,
                driver=driver,
                step=step,
                recurrence=recurrence,
                key=layer_key,
            )
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
            ys: Values at `ts`, without gaps: `nde.paths.fill_gaps(ts, ys)`.

        Raises:
            ValueError: if the series does not fit the model, or is not finite or not in order.
            RuntimeError: for the same numbers inside a transformation.
        """
        ts, xs = self._driven(ts, ys)
        return self.readout(self.layers[-1].last(ts, xs))

    def trajectory(
        self, ts: Float[Array, " times"], ys: Float[Array, "times channels"]
    ) -> Float[Array, "times out_size"]:
        """The outputs at `ts`; each depends on the series up to its time alone."""
        ts, xs = self._driven(ts, ys)
        return jax.vmap(self.readout)(self.layers[-1](ts, xs))

    def _driven(self, ts, ys):
        """The times, and what drives the last layer."""
        ts, ys = check_series(ts, ys, self.channels)
        dtype = self.readout.weight.dtype
        # Times are made relative before they lose precision.
        ts, xs = (ts - ts[0]).astype(dtype), ys.astype(dtype)
        for layer in self.layers[:-1]:
            xs = layer(ts, xs)
        return ts, xs


def check_step(step: Callable, block: int) -> None:
    """`step` keeps the shape of a generator, and makes 0 of 0: an interval without an increment, as in
    padding, changes nothing."""
    check_callable("step", step, "(generator)")
    with jax.ensure_compile_time_eval():
        nothing = jnp.zeros((block, block, 1))
        made = step(nothing)
    if jnp.shape(made) != nothing.shape:
        raise ValueError(
            f"`step` makes {jnp.shape(made)} of a generator of shape {nothing.shape}; it must keep "
            "the shape: the matrices are in the first two axes, the lanes behind them."
        )
    if not is_traced(made) and np.any(np.asarray(made) != 0):
        raise ValueError(
            "`step` does not make 0 of 0. It gives M - 1, not M: subtract the identity, so that "
            "where the series stands still the state does too."
        )


def check_series(
    ts: Float[Array, " times"], ys: Float[Array, "times channels"], channels: int
) -> tuple[Float[Array, " times"], Float[Array, "times channels"]]:
    """The series, if it has at least two finite rows of `channels` values, in order."""
    check_times(ts)
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
    if is_traced(ts):
        in_order = jnp.isfinite(ts).all() & (jnp.diff(ts) >= 0).all()
        ts = eqx.error_if(ts, ~in_order, "`ts` must be finite, and must not decrease.")
    # NumPy reads the ends: under `jit` even a slice of a known array is not known.
    elif np.asarray(ts)[-1] < np.asarray(ts)[0]:
        raise ValueError(
            f"`ts` runs backward, from {ts[0]} to {ts[-1]}; reverse it (and the data with it)."
        )
    fill = "fill gaps first: nde.paths.fill_gaps(ts, ys)."
    if is_traced(ys):
        ys = eqx.error_if(ys, ~jnp.isfinite(ys).all(), f"`ys` must be finite; {fill}")
    elif not np.isfinite(np.asarray(ys)).all():
        row, channel = (int(i) for i in np.argwhere(~np.isfinite(np.asarray(ys)))[0])
        raise ValueError(f"`ys` is {ys[row, channel]} at time {row}, channel {channel}; {fill}")
    return ts, ys

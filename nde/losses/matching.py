r"""Flow matching: a flow learned by regression, without a solve.

A pair (x0, x1) of base and data is joined by a path with a known velocity u, and the field regresses
on it; its least-squares solution E[u | x_t = x] is a field whose flow takes the law of x_t along.

    L = E |v(t, x_t) - u|^2,     t ~ U(0, 1)

    Straight              x_t = (1-t) x0 + t x1 + s e           u = x1 - x0
    SchroedingerBridge    x_t = (1-t) x0 + t x1 + s w e         u = x1 - x0 + s (1-2t) e / (2 w)
    VariancePreserving    x_t = cos(a) x0 + sin(a) x1           u = pi/2 (cos(a) x1 - sin(a) x0)

with w^2 = t (1-t), a = pi t / 2, and e standard normal. The bridge's u has no finite mean square at
its ends, so its squares are weighted by 4 t (1-t), which leaves the least-squares solution as it is.

Pairs may be drawn together, from the batch at hand: those that are closest make ways straight, and
one Euler step nearly enough.

    independent    as they come
    optimal        the permutation with the least sum of |x0 - x1|^2
    Entropic       from the plan with the least sum minus r times its entropy: r = 2 s^2 makes the bridge

With conditions only pairs of one condition are joined, or the base would be skewed condition by
condition; the draws of the base have those of the data they came with.

The loss does not go to zero: for N(0, 1) and N(m, s^2) the least value is pi s / 2 with independent
pairs, and 0 with optimal ones. It says nothing about quality: report likelihood and samples.

In code:    e -> `noise`, of the shape of x; u -> `target`, times the root of its weight
Cost:       one evaluation of the field per example; `optimal` is cubic in the size of the batch.
Reference:  Improving and generalizing flow-based generative models with minibatch optimal transport
            (2023) | arXiv:2302.00482
            Flow matching for generative modeling (2022) | arXiv:2210.02747
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from nde._inputs import check_callable
from nde.losses.squared_error import mse

Points = Float[Array, "examples size"]
Times = Float[Array, "examples 1"]


class Draw(NamedTuple):
    """Points on paths, and the velocity there times `root`, of the weight of its square."""

    x: Points
    target: Points
    root: Times | float


class AbstractBridge(eqx.Module):
    """A path from x0 to x1."""

    @abstractmethod
    def __call__(self, t: Times, x0: Points, x1: Points, noise: Points) -> Draw:
        """The points at `t`, given standard normal noise."""


class Straight(AbstractBridge):
    """The straight line from x0 to x1, with noise of standard deviation `sigma` around it."""

    sigma: float = 0.0

    def __check_init__(self):
        if not self.sigma >= 0:
            raise ValueError(f"`sigma` is {self.sigma}; a standard deviation, 0 or more.")

    def __call__(self, t: Times, x0: Points, x1: Points, noise: Points) -> Draw:
        """The points at `t`."""
        return Draw((1 - t) * x0 + t * x1 + self.sigma * noise, x1 - x0, 1.0)


class SchroedingerBridge(AbstractBridge):
    """The Brownian bridge of variance `sigma`^2 t (1-t) from x0 to x1; with `Entropic(2 * sigma**2)`
    pairs the Schroedinger bridge."""

    sigma: float = 1.0

    def __check_init__(self):
        if not self.sigma > 0:
            raise ValueError(f"`sigma` is {self.sigma}; it must be positive; else use Straight().")

    def __call__(self, t: Times, x0: Points, x1: Points, noise: Points) -> Draw:
        """The points at `t`."""
        width = jnp.sqrt(t * (1 - t))
        target = 2 * width * (x1 - x0) + self.sigma * (1 - 2 * t) * noise
        return Draw((1 - t) * x0 + t * x1 + self.sigma * width * noise, target, 2 * width)


class VariancePreserving(AbstractBridge):
    """The arc from x0 to x1: where both have unit variance, so has every point between."""

    def __call__(self, t: Times, x0: Points, x1: Points, noise: Points) -> Draw:
        """The points at `t`."""
        angle = jnp.pi / 2 * t
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return Draw(cos * x0 + sin * x1, jnp.pi / 2 * (cos * x1 - sin * x0), 1.0)


def independent(
    key: PRNGKeyArray, x0: Points, x1: Points, args: PyTree[Array]
) -> Int[Array, " examples"]:
    """Which draw of the base each example is joined with: its own."""
    del key, x1, args
    return jnp.arange(len(x0))


def optimal(
    key: PRNGKeyArray, x0: Points, x1: Points, args: PyTree[Array]
) -> Int[Array, " examples"]:
    """Which draw of the base each example is joined with: by the exact assignment with the least sum
    of squared distances, within equal conditions."""
    import optax  # as in `nde.fit`: a program that only solves need not load it

    del key
    rows, columns = optax.assignment.hungarian_algorithm(_costs(x0, x1, args))
    return jnp.zeros(len(x0), rows.dtype).at[columns].set(rows)


class Entropic(eqx.Module):
    """Which draw of the base each example is joined with: drawn from the entropic plan of the batch,
    found by Sinkhorn's iteration.

    Args:
        regularization: Weight r of the entropy, in squared units of x.
        iterations: Of Sinkhorn.
    """

    regularization: float
    iterations: int = eqx.field(default=100, static=True)

    def __call__(
        self, key: PRNGKeyArray, x0: Points, x1: Points, args: PyTree[Array]
    ) -> Int[Array, " examples"]:
        """The numbers of the draws."""
        scaled = -_costs(x0, x1, args) / self.regularization

        def iterate(_, potentials):
            f, g = potentials
            f = -jax.nn.logsumexp(scaled + g[None], axis=1)
            return f, -jax.nn.logsumexp(scaled + f[:, None], axis=0)

        start = jnp.zeros(len(x0), scaled.dtype)
        f, g = jax.lax.fori_loop(0, self.iterations, iterate, (start, start))
        return jax.random.categorical(key, scaled + f[:, None] + g[None], axis=0)


def flow_matching(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    path: AbstractBridge = Straight(),
    pairs: Callable = independent,
) -> Float[Array, ""]:
    """The loss of a flow that is learned by regression; see the module for the equations.

    Give it to `nde.fit` as it is, or with its options bound:
    `functools.partial(losses.flow_matching, pairs=losses.optimal)`.

    Args:
        model: An `nde.CNF`: its `vector_field` learns, draws come from its `base`.
        batch: An `nde.train.Batch` whose data is x, shape (examples, size), or (x, args), args a
            PyTree of arrays with a leading axis: the conditions.
        key: Of times, noise and draws of the base.
        path: `Straight(sigma)`, `SchroedingerBridge(sigma)` or `VariancePreserving()`.
        pairs: `independent`, `optimal`, `Entropic(regularization)`, or any
            `pairs(key, x0, x1, args) -> numbers` of the draws x0 that the examples x1 are joined with.

    Returns:
        The mean square over examples and dimensions.

    Raises:
        ValueError: for data of another form or size.
    """
    check_callable("pairs", pairs, "(key, x0, x1, args)")
    check_callable("path", path, "(t, x0, x1, noise)")
    x1, args = points_of(batch, "flow_matching")
    count = len(x1)
    base_key, pair_key, noise_key, order_key, time_key = jax.random.split(key, 5)
    x0 = jax.vmap(model.base.sample)(jax.random.split(base_key, count)).astype(x1.dtype)
    if x0.shape != x1.shape:
        raise ValueError(
            f"`batch.data` holds points of shape {x1.shape[1:]} but `base` has samples of shape "
            f"{x0.shape[1:]}; base and data are of one size."
        )
    x0 = jax.lax.stop_gradient(x0)[pairs(pair_key, x0, x1, args)]
    # One time in each of `count` equal parts, in random order: evenly spread, and each is uniform.
    parts = jax.random.permutation(order_key, count)[:, None].astype(x1.dtype)
    t = (parts + jax.random.uniform(time_key, (count, 1), x1.dtype)) / count
    drawn = path(t, x0, x1, jax.random.normal(noise_key, x1.shape, x1.dtype))
    axes = (0, 0, None if args is None else 0)
    velocity = jax.vmap(model.vector_field, in_axes=axes)(t[:, 0], drawn.x, args)
    return mse(drawn.root * velocity, drawn.target, batch.mask)


def points_of(batch: Any, loss: str) -> tuple[Points, PyTree[Array] | None]:
    """Points and conditions of a batch."""
    if not hasattr(batch, "data"):
        raise ValueError(
            f"`batch` is {eqx.tree_pformat(batch)}; a loss takes a Batch of the data: "
            "nde.train.Batch(x)."
        )
    data = batch.data
    x, args = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if not eqx.is_array(x) or x.ndim != 2:
        raise ValueError(
            f"`batch.data` is {eqx.tree_pformat(data)}; `{loss}` takes points x of shape (examples, "
            "size), or (x, args) with a condition for each."
        )
    return x, args


def _costs(x0: Points, x1: Points, args: PyTree[Array] | None) -> Float[Array, "draws examples"]:
    """Squared distances; far more than any of them between different conditions."""
    x0, x1 = jax.lax.stop_gradient((x0, x1))
    squares = jnp.sum(x0**2, axis=1)[:, None] + jnp.sum(x1**2, axis=1)[None]
    costs = squares - 2 * x0 @ x1.T
    differ = jnp.zeros(costs.shape, bool)
    for leaf in jax.tree.leaves(args):
        rows = leaf.reshape(len(leaf), -1)
        differ = differ | jnp.any(rows[:, None] != rows[None], axis=2)
    return jnp.where(differ, costs + 1e3 * jnp.max(jnp.abs(costs)), costs)

r"""The adversarial loss of a generator of paths: a critic that is a controlled equation (SDE-GAN).

    H(t0) = xi(Y(t0)),    dH = F(H) dY^,    score D(Y) = m . H(t0) + m' . H(t1),    Y^ = (t, Y)

    critic      max over D of   E D(real) - E D(fake)          <= Wasserstein distance if D is 1-Lipschitz
    generator   min over G of   - E D(fake)

The critic is kept Lipschitz without a penalty: its activation is LipSwish, .909 x sigmoid(x), of slope
at most 1, and after each of its updates every weight matrix (not the biases) is clipped to
[-1/n_out, 1/n_out], which bounds the 1-norm of the layer by 1.

    model = {"generator": generator, "critic": nde.gan.PathCritic(1, 16, 16, 1, key=key)}

trained by two losses in turn, `critic_loss` over the critic and `generator_loss` over the generator, each
with an optimizer of its own, `project` after each update, and an average of the generator over the
second half of the steps. The loss is no measure of progress: look at marginals (`nde.evaluate`).

In code:    xi -> initial, F -> field, (m, m') -> readout    E D(real) - E D(fake) -> `gap`
Not for:    a first try: `losses.path_score` needs no adversary and no luck.
Reference:  Neural SDEs as infinite-dimensional GANs (2021) | arXiv:2102.03657
            Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde import paths
from nde._inputs import check_key
from nde.cde import NeuralCDE
from nde.fields import MatrixField
from nde.losses.path_score import draw
from nde.losses.series import as_series
from nde.solvers.inputs import check_count

__all__ = ["PathCritic", "clipped", "critic_loss", "generator_loss", "lipswish", "project"]

LIPSWISH = 0.909


def lipswish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """.909 x sigmoid(x): a smooth activation with Lipschitz constant 1."""
    return LIPSWISH * jax.nn.silu(x)


class PathCritic(eqx.Module):
    """A score of one path, by a neural controlled equation along it.

    Args:
        channels: Of the paths, without time.
        hidden: Entries of the state.
        width: Units of the hidden layers of the field.
        depth: Number of hidden layers.
        key: Of the initial weights, which are clipped.
    """

    cde: NeuralCDE
    readout: eqx.nn.Linear

    def __init__(self, channels: int, hidden: int, width: int, depth: int, *, key: PRNGKeyArray):
        check_key(key)
        check_count("channels", channels)
        check_count("hidden", hidden)
        keys = jax.random.split(key, 3)
        field = MatrixField(hidden, channels + 1, width, depth, activation=lipswish, key=keys[0])
        initial = eqx.nn.MLP(channels + 1, hidden, width, 1, lipswish, key=keys[1])
        self.cde = NeuralCDE(field, initial)
        self.readout = eqx.nn.Linear(2 * hidden, 1, key=keys[2])
        self.cde, self.readout = clipped((self.cde, self.readout))

    def __call__(
        self, ts: Float[Array, " times"], ys: Float[Array, "times channels"]
    ) -> Float[Array, ""]:
        """The score of a path; padding, which repeats the last row, does not count."""
        length = 1 + jnp.sum(ts[1:] > ts[:-1])
        control = paths.linear(ts, ys, length)
        both = self.cde.trajectory(control, jnp.stack([ts[0], ts[-1]]))
        return self.readout(both.reshape(-1))[0]


def clipped(critic: PyTree) -> PyTree:
    """The critic with every weight matrix in [-1/n_out, 1/n_out]; biases and all else as they are."""

    def is_linear(x: Any) -> bool:
        return isinstance(x, eqx.nn.Linear)

    def clip(x: Any) -> Any:
        if not is_linear(x):
            return x
        bound = 1 / x.weight.shape[0]
        return eqx.tree_at(lambda x: x.weight, x, jnp.clip(x.weight, -bound, bound))

    return jax.tree.map(clip, critic, is_leaf=is_linear)


def project(model: dict[str, Any]) -> dict[str, Any]:
    """The pair with a clipped critic: what keeps it Lipschitz, after each update."""
    return model | {"critic": clipped(model["critic"])}


def critic_loss(
    model: dict[str, Any], batch: Any, key: PRNGKeyArray, *, args: PyTree[Any] = None
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Minus what the critic tells real from fake paths by, E D(real) - E D(fake).

    Args:
        model: `{"generator": .., "critic": ..}`: the first draws paths, `model(ts, key=key)` or
            `model(ts, args, key=key)`, the second scores one, such as `PathCritic`.
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and (examples, times,
            channels). Nothing may be missing between the first and the last time.
        key: Of the paths.
        args: Passed to the generator if it is not None.
    """
    real, fake, mask = _scores(model, batch, key, args, "critic_loss")
    gap = _mean(real, mask) - _mean(fake, mask)
    return -gap, {"gap": gap}


def generator_loss(
    model: dict[str, Any], batch: Any, key: PRNGKeyArray, *, args: PyTree[Any] = None
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Minus the mean score of fake paths; arguments as for `critic_loss`."""
    real, fake, mask = _scores(model, batch, key, args, "generator_loss")
    return -_mean(fake, mask), {"gap": _mean(real, mask) - _mean(fake, mask)}


def _scores(model, batch, key, args, name):
    ts, ys, _ = as_series(batch.data, name)
    fake = draw(model["generator"], ts, args, batch.example_keys(key))
    score = jax.vmap(model["critic"])
    return score(ts, ys), score(ts, fake), batch.mask


def _mean(x: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.sum(mask, dtype=x.dtype)

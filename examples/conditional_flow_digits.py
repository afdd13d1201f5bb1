"""# Digits on demand: a flow for every class

Images of handwritten digits, 8 x 8 pixels with 17 levels of grey, as samples of one flow whose
condition is the class. The field is trained by flow matching, with optimal pairs within each class:
pairs across classes would skew the base class by class. Grey levels are integers, so uniform noise
makes densities of them, and the likelihood is in bits per pixel.

What is asked of the samples: that a logistic regression, trained on real digits alone, sees the class
that was ordered; and that they are not copies, so their distance to the nearest digit of the training
set is beside that of real test digits.

*Gotcha: a bit count is comparable only with the noise of the levels and the scale of the pixels
written down: here it is per pixel, of levels 0 to 16.*

Source: the digits of scikit-learn (E. Alpaydin and C. Kaynak, 1998).
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.linear_model

import nde
from nde.cnf import one_hot
from nde.losses import flow_matching, optimal

PIXELS, CLASSES, LEVELS = 64, 10, 17
TRAIN = 1408
NUMERICS = {"stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)}


def digits(seed=0):
    """Levels 0 to 16, shape (digits, 64), and labels: those to train on, and those to test on."""
    levels, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    levels, labels = levels[order].astype(float), labels[order]
    return (levels[:TRAIN], labels[:TRAIN]), (levels[TRAIN:], labels[TRAIN:])


def to_points(levels, key):
    """Pixels in [-1, 1], with uniform noise of one level."""
    noise = jax.random.uniform(key, levels.shape, levels.dtype)
    return 2 * (levels + noise) / LEVELS - 1


def to_levels(points):
    """The levels that points stand for."""
    return jnp.clip(jnp.floor((points + 1) / 2 * LEVELS), 0, LEVELS - 1)


def loss(model, batch, key):
    """Flow matching within classes, with new noise on the levels."""
    noise_key, key = jax.random.split(key)
    levels, labels = batch.data
    data = (to_points(levels, noise_key), one_hot(labels, CLASSES))
    return flow_matching(model, eqx.tree_at(lambda b: b.data, batch, data), key, pairs=optimal)


def train(data, steps, width=256, seed=0):
    """A trained flow, and its history."""
    levels, labels = data
    field = nde.fields.MLPField(
        PIXELS, width, 3, time=True, context=CLASSES, activation=jax.nn.silu,
        final_activation=lambda x: x, key=jax.random.key(seed),
    )  # fmt: skip
    return nde.fit(
        nde.CNF(field, nde.cnf.Normal(PIXELS), **NUMERICS), loss,
        (jnp.asarray(levels), jnp.asarray(labels)),
        optim=optax.adam(optax.cosine_decay_schedule(1e-3, steps)), steps=steps, batch_size=128,
        progress=False, key=jax.random.key(seed + 1),
    )  # fmt: skip


@eqx.filter_jit
def draw(model, labels, key):
    """One image of each label, levels, shape (labels, 64)."""
    keys = jax.random.split(key, len(labels))
    return to_levels(jax.vmap(model.sample)(keys, one_hot(labels, CLASSES)))


@eqx.filter_jit
def bits(model, levels, labels, key):
    """Bits per pixel of every image, of levels: the exact trace, one draw of the noise."""
    points = to_points(levels, key)
    nats = jax.lax.map(
        lambda one: model.log_prob(one[0], one[1]),
        (points, one_hot(labels, CLASSES)),
        batch_size=32,
    )
    return -nats / PIXELS / jnp.log(2) - jnp.log2(2 / LEVELS)


def nearest(levels, known):
    """Distance of each image to the nearest of the known, in levels per pixel."""
    squares = np.sum((levels[:, None] - known[None]) ** 2, axis=2).min(axis=1)
    return np.sqrt(squares / PIXELS)


def judge(model, known, held, per_class=40, densities=128):
    """Recognised share, distances, bits per pixel."""
    judged = sklearn.linear_model.LogisticRegression(max_iter=3000).fit(known[0], known[1])
    labels = np.repeat(np.arange(CLASSES), per_class)
    samples = np.asarray(draw(model, jnp.asarray(labels), jax.random.key(5)))
    few = slice(densities)
    per_pixel = bits(model, jnp.asarray(held[0][few]), jnp.asarray(held[1][few]), jax.random.key(6))
    return samples, {
        "recognised": float(np.mean(judged.predict(samples) == labels)),
        "recognised_real": judged.score(*held),
        "nearest": float(nearest(samples, known[0]).mean()),
        "nearest_real": float(nearest(held[0], known[0]).mean()),
        "bits": float(jnp.mean(per_pixel)),
        "bits_error": float(jnp.std(per_pixel) / np.sqrt(len(per_pixel))),
    }


def picture(samples):
    """Samples, one column a class."""
    import matplotlib.pyplot as plt

    rows = samples.reshape(CLASSES, -1, 8, 8)[:, :8]
    fig, axes = plt.subplots(8, CLASSES, figsize=(7, 5.6), layout="constrained")
    for column, images in enumerate(rows):
        for ax, image in zip(axes[:, column], images, strict=True):
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
            ax.axis("off")
    nde.plot.save(fig, "conditional_flow_digits.png")


def main(steps: int = 6000, plot: bool = True, *, width: int = 256, per_class: int = 40) -> dict:
    """Train, draw, judge, print, save the picture."""
    known, held = digits()
    model, history = train(known, steps, width)
    samples, found = judge(model, known, held, per_class)
    print(
        f"{steps} steps in {history.seconds:.0f} s, loss {history.final_loss:.3f}\n"
        f"recognised: {found['recognised']:.1%} of the samples, {found['recognised_real']:.1%} of "
        f"real test digits\nnearest training digit, levels per pixel: {found['nearest']:.2f} from "
        f"samples, {found['nearest_real']:.2f} from test digits\n"
        f"bits per pixel of test digits: {found['bits']:.2f} +- {found['bits_error']:.2f} (uniform: "
        f"{np.log2(LEVELS):.2f})"
    )
    if steps >= 6000:  # trained, and not only tried
        assert found["recognised"] > 0.9 and found["bits"] < np.log2(LEVELS)
        assert found["nearest"] > 0.7 * found["nearest_real"], "copies of the training set"
    if plot:
        picture(samples)
    return found


# *What to take away*: a flow is conditional by a context of its field, and pairs are optimal within a
# condition. *Next*: where one flow has been trained three ways, `flow_moons.py`.

if __name__ == "__main__":
    main()

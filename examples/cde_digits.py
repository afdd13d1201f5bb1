"""# Handwritten digits, read line by line with pixels missing

The 1797 digits of scikit-learn, 8 x 8 pixels each, as series: a line of pixels is an observation of
eight channels, and the lines arrive one after the other. Then 30 % of all pixels are missing,
each on its own. A neural CDE fills each channel from its own observations and follows the path. It
is trained on eight copies of each digit, which miss other pixels.

Beside it stands logistic regression, which is told the same, the filled pixels and the counts, but
sees all lines at once.

*Gotcha: whether a pixel was seen is a channel too. `counts=True` adds how often each channel has been
observed so far.*

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998), UCI Machine
Learning Repository, as it ships with scikit-learn.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.linear_model

import nde
from nde import paths
from nde.cde import NeuralCDE

TRAIN, COPIES = 1300, 8  # of 1797 digits
HIDDEN, CHANNELS = 32, 17  # time, 8 pixels, 8 counts
TS = np.linspace(0.0, 1.0, 8)


def digits(missing, rng):
    """Lines of standardized pixels, NaN where missing, shape (digits, 8, 8), and labels: copies of
    the digits to train on, then those to test on."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    order = np.concatenate([np.tile(order[:TRAIN], COPIES), order[TRAIN:]])
    images = images.reshape(-1, 8, 8)
    images = ((images - images.mean()) / images.std())[order]
    seen = rng.uniform(size=images.shape) >= missing
    seen[:, 0] |= ~seen.any(axis=1)  # a channel needs an observation
    return np.where(seen, images, np.nan), labels[order]


def controls_of(images):
    """The paths of all digits, and the filled pixels that they pass through."""
    make = jax.vmap(lambda ys: paths.hermite_cubic(jnp.asarray(TS), ys, counts=True))
    controls = jax.jit(make)(jnp.asarray(images))
    pixels = jax.vmap(lambda path: jax.vmap(path.evaluate)(path.times))(controls)[:, :, 1:]
    return controls, np.asarray(pixels.reshape(len(images), -1))


def make_model(key):
    """From (time, pixels, counts) to the logits of ten digits."""
    key_field, key_initial, key_readout = jax.random.split(key, 3)
    field = nde.fields.MatrixField(HIDDEN, CHANNELS, width=64, depth=1, key=key_field)
    initial = eqx.nn.MLP(CHANNELS, HIDDEN, 64, 1, key=key_initial)
    readout = eqx.nn.Linear(HIDDEN, 10, key=key_readout)
    return NeuralCDE(field, initial, readout)


def loss(model, batch, key):
    """Cross-entropy."""
    controls, labels = batch.data
    logits = jax.vmap(model)(controls)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(entropy, where=batch.mask)


def train(missing, steps, seed):
    """Test accuracies of the neural CDE and of logistic regression."""
    began = time.perf_counter()
    images, labels = digits(missing, np.random.default_rng(seed))
    controls, pixels = controls_of(images)
    known, held = (
        jax.tree.map(lambda leaf, part=part: leaf[part], (controls, jnp.asarray(labels)))
        for part in (slice(TRAIN * COPIES), slice(TRAIN * COPIES, None))
    )
    model, history = nde.fit(
        make_model(jax.random.key(seed)),
        loss,
        known,
        optim=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        ),
        steps=steps,
        batch_size=64,
        progress=False,
        key=jax.random.key(seed + 1),
    )
    logits = jax.jit(jax.vmap(model))(held[0])
    straight = sklearn.linear_model.LogisticRegression(C=0.05, max_iter=2000)
    straight.fit(pixels[: TRAIN * COPIES], labels[: TRAIN * COPIES])
    return {
        "loss": history.final_loss,
        "accuracy": float((logits.argmax(axis=1) == held[1]).mean()),
        "regression": float(straight.score(pixels[TRAIN * COPIES :], labels[TRAIN * COPIES :])),
        "seconds": time.perf_counter() - began,
    }


def main(
    steps: int = 600, plot: bool = True, *, missing: tuple = (0.0, 0.3), seed: int = 0
) -> dict:
    """Train for each fraction of missing pixels; test accuracies, losses and seconds by fraction.

    There is nothing to plot.
    """
    del plot
    results = {fraction: train(fraction, steps, seed) for fraction in missing}
    print(f"{'missing':>8}{'loss':>9}{'neural CDE':>12}{'regression':>12}{'seconds':>9}")
    for fraction, row in results.items():
        accuracies = f"{row['accuracy']:>12.1%}{row['regression']:>12.1%}"
        print(f"{fraction:>8.0%}{row['loss']:>9.4f}{accuracies}{row['seconds']:>9.1f}")
    if steps >= 500:  # fewer are a trial of the program, not a fit
        for fraction, row in results.items():
            assert row["accuracy"] > row["regression"] - 0.03, (fraction, row)
    return results


# *What to take away*: values may be missing channel by channel, and the model needs no change. An
# image is no series: regression on all of its pixels does as well.
# *Next*: series of unequal length and times of their own, `cde_spirals.py`.

if __name__ == "__main__":
    main()

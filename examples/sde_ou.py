"""# One process, four losses: what teaches a neural SDE its noise

An Ornstein-Uhlenbeck process that is pushed upwards and grows noisier,

    dY = (0.02 t - 0.1 Y) dt + 0.8 t/63 dW,        Y(0) ~ U(-1, 1),        t in [0, 63]

is learned from samples of its paths alone, by the same generator and four losses:

- **moments**: means, variances and autocovariances;
- **pairs**: the energy score of the values at two random times, which determines the law of a
  Markov process;
- **signature**: the signature-kernel score of whole paths;
- **GAN**: a critic of paths, a neural controlled equation, trained against the generator.

Each model is judged by fresh samples: the Kolmogorov-Smirnov distance at five times beside what
chance gives, and the correlation of two times, which no one-time marginal shows.

*Gotcha: a squared error between drawn and observed paths has its least value at a model without any
noise. None of these four is one.*

Source: P. Kidger et al., Neural SDEs as infinite-dimensional GANs (2021) | arXiv:2102.03657
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import gan, losses
from nde.solvers import ReversibleHeun

TIMES = np.arange(0.0, 64.0, 3.0)
END, UNIT, SCALE = 63.0, 10.0, 5.0  # one unit of time and of value for the networks
LOOK = (2, 6, 10, 15, 21)  # indices of the times at which marginals are compared: 6 .. 63
HIDDEN, WIDTH, NOISE = 8, 16, 3
COLORS = {"moments": "#EE7733", "pairs": "#4477AA", "signature": "#228833", "GAN": "#AA3377"}


def process(seed, paths):
    """Exact paths at `TIMES`, shape (paths, times, 1): from one time to the next the law is Gaussian."""
    rng = np.random.default_rng(seed)
    y = rng.uniform(-1, 1, paths)
    rows = [y]
    for start, end in zip(TIMES, TIMES[1:], strict=False):
        s = np.linspace(start, end, 401)
        weight = np.exp(-0.1 * (end - s))
        mean = np.trapezoid(weight * 0.02 * s, s)
        variance = np.trapezoid((weight * 0.8 * s / END) ** 2, s)
        y = np.exp(-0.1 * (end - start)) * y + mean + np.sqrt(variance) * rng.standard_normal(paths)
        rows.append(y)
    return np.stack(rows, axis=1)[:, :, None]


def generator(key):
    """Networks of one hidden layer; the state has more entries than are read out."""
    keys = jax.random.split(key, 4)
    options = dict(time=True, activation=gan.lipswish)
    return nde.NeuralSDE(
        eqx.nn.MLP(5, HIDDEN, WIDTH, 1, gan.lipswish, key=keys[0]),
        nde.fields.MLPField(HIDDEN, WIDTH, 1, key=keys[1], **options),
        nde.fields.MatrixField(HIDDEN, NOISE, WIDTH, 1, key=keys[2], **options),
        eqx.nn.Linear(HIDDEN, 1, key=keys[3]),
        initial_noise=5,
        solver=ReversibleHeun(),
    )


def data(seed, paths):
    """Times and values in the units of the networks, shapes (paths, times) and (paths, times, 1)."""
    ts = jnp.asarray(TIMES / UNIT, dtype=float)
    return jnp.tile(ts, (paths, 1)), jnp.asarray(process(seed, paths) / SCALE, dtype=float)


SCORES = {
    "moments": functools.partial(losses.moments, lags=(1, 4)),
    "pairs": functools.partial(losses.finite_dimensional_score, draws=8),
    "signature": functools.partial(
        losses.signature_score, static_kernel=losses.RBF(1.0), dyadic_order=0
    ),
}
BATCH = {"moments": 256, "pairs": 256, "signature": 32, "GAN": 256}
SHARE = {
    "moments": 1.0,
    "pairs": 1.0,
    "signature": 0.25,
    "GAN": 3.0,
}  # of the steps, for like seconds


def train(name, sample, *, steps, seed):
    """A generator trained by one loss, and the seconds that its steps took."""
    model, steps = generator(jax.random.key(seed)), max(2, round(SHARE[name] * steps))
    options = dict(batch_size=min(BATCH[name], len(sample[0])), progress=False)
    key = jax.random.key(seed + 1)
    if name == "GAN":
        return train_gan(model, sample, steps=steps, key=key, **options)
    optim = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    )
    loss = functools.partial(losses.path_score, score=SCORES[name])
    model, history = nde.fit(model, loss, sample, optim=optim, steps=steps, key=key, **options)
    return model, history.seconds


def train_gan(model, sample, *, steps, key, **options):
    """The critic has every other step; weights are averaged over the second half."""
    pair = {"generator": model, "critic": gan.PathCritic(1, 16, 16, 1, key=key)}
    turns = [
        nde.train.Turn(gan.critic_loss, optax.rmsprop(2e-3), lambda m: m["critic"]),
        nde.train.Turn(gan.generator_loss, optax.rmsprop(1e-3), lambda m: m["generator"]),
    ]
    average = nde.train.Average(start=steps // 2)
    pair, history = nde.fit(
        pair, turns, sample, steps=steps, project=gan.project, average=average, key=key, **options
    )
    return pair["generator"], history.seconds


@eqx.filter_jit
def draw(model, key, paths):
    """Paths of a model in the units of the data, shape (paths, times, 1)."""
    ts = jnp.asarray(TIMES / UNIT, dtype=float)
    return SCALE * jax.vmap(lambda key: model(ts, key=key))(jax.random.split(key, paths))


def report(paths, real):
    """KS distances at five times, how many are beyond chance, and the correlation of times 6 and 63."""
    test = nde.evaluate.ks(paths[:, LOOK, 0], real[:, LOOK, 0])
    correlation = lambda y: np.corrcoef(y[:, -2, 0], y[:, -1, 0])[0, 1]
    return {
        "ks": np.asarray(test.statistic),
        "rejected": int(np.sum(np.asarray(test.p_value) < 0.05)),
        "correlation": float(correlation(np.asarray(paths)) - correlation(real)),
    }


def table(results, chance):
    """One row per loss."""
    times = "".join(f"{f'KS at {TIMES[i]:.0f}':>10}" for i in LOOK)
    lines = [f"{'':<11}{times}{'rejected':>10}{'correlation':>13}{'train s':>9}"]
    for name, row in results.items():
        distances = "".join(f"{d:>10.3f}" for d in row["ks"])
        rest = f"{row['rejected']:>8}/5{row['correlation']:>+13.3f}{row['seconds']:>9.1f}"
        lines.append(f"{name:<11}{distances}{rest}")
    lines.append(f"{'chance':<11}{chance:>10.3f} is exceeded by 5 % of equal laws")
    return "\n".join(lines)


def picture(samples, real):
    """A fan of each model over that of the data, and the marginals at the last time."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        2, len(samples), figsize=(11, 5), sharex="row", squeeze=False, layout="constrained"
    )
    for (name, paths), (top, bottom) in zip(samples.items(), axes.T, strict=True):
        nde.plot.fan(TIMES, real, ax=top, color="0.4", label="process")
        nde.plot.fan(TIMES, np.asarray(paths), ax=top, color=COLORS[name], label=name)
        top.set(title=name, xlabel="t")
        bins = np.linspace(real[:, -1].min(), real[:, -1].max(), 40)
        bottom.hist(real[:, -1, 0], bins, density=True, color="0.75")
        bottom.hist(
            np.clip(np.asarray(paths)[:, -1, 0], bins[0], bins[-1]),
            bins,
            density=True,
            histtype="step",
            color=COLORS[name],
        )
        bottom.set(xlabel="Y(63)", yticks=[])
    axes[0, 0].legend(frameon=False)
    nde.plot.save(fig, "sde_ou.png")
    plt.close(fig)


def main(
    steps: int = 400,
    plot: bool = True,
    *,
    names: tuple = ("moments", "pairs", "signature", "GAN"),
    paths: int = 8192,
    judged: int = 2048,
    seed: int = 0,
) -> dict:
    """Train with each loss, print the table, save the picture; the rows of the table by loss."""
    sample, real = data(seed, paths), process(seed + 1000, judged)
    samples, results = {}, {}
    for name in names:
        model, seconds = train(name, sample, steps=steps, seed=seed)
        samples[name] = draw(model, jax.random.key(seed + 2), judged)
        results[name] = report(samples[name], real) | {"seconds": seconds}
    print(table(results, nde.evaluate.ks_quantile(0.95, judged, judged)))
    if plot:
        picture(samples, real)
    return results


# *What to take away*: scores of samples need no adversary and no luck; pairs of times are the cheapest
# that see the dynamics. *Next*: observations that are noisy and partial, `sde_lorenz.py`.

if __name__ == "__main__":
    main()

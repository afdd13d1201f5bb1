"""# What no flow in the plane can do: annuli, and x -> -x

The solutions of an ODE do not cross, so the map from start to end is a homeomorphism. Two tasks that a
map of that kind cannot do in the dimension of its data:

- **x -> -x** on a line: solutions would have to pass through each other;
- **annuli**: a disk inside a ring, to be told apart by a line after the flow. What is inside stays inside.

With a few channels more, zero at the start (`augment`), both are easy: solutions pass over each other.
A plain flow may come near on finitely many points, by tearing a gap into the ring, at the price of a
field that is hard to solve: look at the number of evaluations (NFE).

*Gotcha: a network of layers, or a solver with steps that are too long, can do both tasks without extra
channels, but it is no ODE. The solves here are adaptive, with tolerance 1e-4.*

Source: E. Dupont et al., Augmented Neural ODEs (2019) | arXiv:1904.01681
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde

TS = (0.0, 1.0)
WIDTH = 32
NUMERICS = {"stepsize_controller": diffrax.PIDController(rtol=1e-4, atol=1e-4)}
EXTRA = (0, 1, 3)  # channels


def reflection(seed, examples):
    """Points of a line, and their reflections."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.0, 1.0, (examples, 1))
    return jnp.asarray(x, dtype=float), jnp.asarray(-x, dtype=float)


def annuli(seed, examples):
    """Points of a disk of radius 0.5 and of a ring from 1 to 1.5, and 1 for those of the ring."""
    rng = np.random.default_rng(seed)
    outer = rng.uniform(size=examples) < 0.5
    squares = np.where(outer, rng.uniform(1.0, 2.25, examples), rng.uniform(0.0, 0.25, examples))
    angle = rng.uniform(0, 2 * np.pi, examples)
    x = np.sqrt(squares)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return jnp.asarray(x, dtype=float), jnp.asarray(outer, dtype=float)


def make(task, extra, key):
    """A neural ODE; the one of annuli ends in a line, the boundary between the classes."""
    size = 1 if task == "x -> -x" else 2
    key_field, key_line = jax.random.split(key)
    field = nde.fields.MLPField(size + extra, WIDTH, 2, scale=3.0, key=key_field)
    if task == "x -> -x":
        return nde.NeuralODE(field, augment=extra, **NUMERICS)
    line = eqx.nn.Linear(size + extra, "scalar", key=key_line)
    return nde.NeuralODE(field, augment=extra, readout=line, **NUMERICS)


def solve(model, x):
    """Output at the end, the evaluations, and whether the solve failed."""
    solution = model.solve(jnp.array(TS), x, throw=False)
    return solution.ys[-1], solution.stats["nfe"], solution.result != diffrax.RESULTS.successful


def losses_of(outputs, targets):
    """Squared error of a reflection, cross-entropy of a class."""
    if outputs.ndim == 2:
        return jnp.sum((outputs - targets) ** 2, axis=1)
    return optax.sigmoid_binary_cross_entropy(outputs, targets)


def loss(model, batch, key):
    """The mean over a batch."""
    del key
    x, targets = batch.data
    outputs, nfe, failed = jax.vmap(lambda x: solve(model, x))(x)
    each = jnp.where(batch.mask, losses_of(outputs, targets), 0.0)
    metrics = {"nfe": jnp.mean(nfe.astype(float)), "failed": jnp.mean(failed.astype(float))}
    return jnp.sum(each) / jnp.sum(batch.mask, dtype=each.dtype), metrics


def train(task, extra, data, *, steps, seed):
    """A trained model and its history."""
    return nde.fit(
        make(task, extra, jax.random.key(seed)),
        loss,
        data,
        optim=optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
        steps=steps,
        batch_size=256,
        progress=False,
        key=jax.random.key(seed + 1),
    )


@eqx.filter_jit
def judge(model, data):
    """Mean loss, share of wrong classes (or of errors above 0.5), and mean NFE."""
    x, targets = data
    outputs, nfe, _ = jax.vmap(lambda x: solve(model, x))(x)
    if outputs.ndim == 2:
        wrong = jnp.abs(outputs - targets)[:, 0] > 0.5
    else:
        wrong = (outputs > 0) != (targets > 0.5)
    return tuple(jnp.mean(v.astype(float)) for v in (losses_of(outputs, targets), wrong, nfe))


def table(results):
    """One row per task and number of extra channels."""
    lines = [
        f"{'':<12}{'extra channels':>16}{'test loss':>12}{'wrong':>9}{'NFE':>8}{'seconds':>10}"
    ]
    for (task, extra), row in results.items():
        numbers = (
            f"{row['loss']:>12.4f}{row['wrong']:>9.1%}{row['nfe']:>8.1f}{row['seconds']:>10.1f}"
        )
        lines.append(f"{task:<12}{extra:>16}{numbers}")
    return "\n".join(lines)


def picture(models, data):
    """Where each flow takes the points of the annuli, and its boundary."""
    import matplotlib.pyplot as plt

    x, outer = (np.asarray(part) for part in data)
    fig, axes = plt.subplots(1, len(models), figsize=(10, 3.2), layout="constrained")
    for ax, (extra, model) in zip(np.atleast_1d(axes), models.items(), strict=True):
        line = np.linspace(-1.7, 1.7, 90)
        grid = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2), dtype=float)
        logits = jax.jit(jax.vmap(lambda x, m=model: solve(m, x)[0]))(grid)
        shown = np.asarray(jax.nn.sigmoid(logits)).reshape(90, 90)
        ax.pcolormesh(line, line, shown, cmap="RdBu_r", vmin=0, vmax=1, alpha=0.6, rasterized=True)
        for kind, color in ((0, "#4477AA"), (1, "#CC3311")):
            ax.plot(*x[outer == kind][:250].T, ".", ms=2, color=color)
        ax.set(title=f"{extra} extra channels", aspect="equal", xticks=[], yticks=[])
    nde.plot.save(fig, "augmented_annuli.png")


TASKS = {"x -> -x": reflection, "annuli": annuli}


def main(
    steps: int = 500,
    plot: bool = True,
    *,
    extras: tuple = EXTRA,
    examples: int = 1024,
    seed: int = 0,
) -> dict:
    """Train every task with every number of channels, print the table, save the picture."""
    results, models = {}, {}
    for task, simulate in TASKS.items():
        known, unseen = simulate(seed, examples), simulate(seed + 1, 1024)
        for extra in extras:
            model, history = train(task, extra, known, steps=steps, seed=seed)
            found, wrong, nfe = (float(v) for v in judge(model, unseen))
            results[task, extra] = {
                "loss": found, "wrong": wrong, "nfe": nfe, "seconds": history.seconds,
            }  # fmt: skip
            if task == "annuli":
                models[extra] = model
    print(table(results))
    if plot:
        picture(models, annuli(seed + 1, 1024))
    return results


# *What to take away*: where the map that is wanted is no homeomorphism of the data, give the state room:
# a few channels more, and the equation becomes cheaper to solve as well. One is enough in principle; with
# three the training of the annuli does not get stuck.
# *Next*: how to make a trained equation cheap on purpose, `ernode_digits.py`.

if __name__ == "__main__":
    main()

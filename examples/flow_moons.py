"""# Two moons: three ways to train one flow, at equal seconds

A flow carries a normal law to the law of the data. Its field is trained

- by **likelihood**: a solve backwards for every point, with the divergence along it,
- by **matching** with independent pairs: a regression on x1 - x0, no solve,
- by matching with **optimal** pairs: the same, each point of a batch joined with the draw that suits it.

All three give the same kind of model, so all three are judged by the same exact likelihood on new points,
beside the least value there can be, the entropy of the moons. What else differs: the evaluations
(NFE) of one sample, and how straight the ways are (0: one Euler step is exact).

*Gotcha: the loss of matching does not go to zero, and does not say how good a flow is. Compare
likelihoods, by the exact trace.*

Source: the moons of scikit-learn, with noise 0.05, divided by one standard deviation.
"""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.cnf import Normal, straightness
from nde.losses import flow_likelihood, flow_matching, optimal
from nde.solvers import Reversible, ReversibleAdjoint

NOISE, SCALE = 0.05, 0.7202
WIDTH = 128
BATCH = {"likelihood": 128, "independent": 512, "optimal": 128}
LOSSES = {
    "likelihood": flow_likelihood,
    "independent": flow_matching,
    "optimal": functools.partial(flow_matching, pairs=optimal),
}
STEPS = 8  # of one solve in training
TRAINING = {
    "solver": Reversible(diffrax.Bosh3()),
    "adjoint": ReversibleAdjoint(),
    "stepsize_controller": diffrax.ConstantStepSize(),
    "dt0": 1 / STEPS,
    "max_steps": STEPS,
}
JUDGING = {"stepsize_controller": diffrax.PIDController(rtol=1e-5, atol=1e-5)}
SAMPLING = {"stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)}


def arcs(angles):
    """The points of both half circles without noise, shape (2, angles, 2)."""
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.stack([upper, [1.0, 0.5] - upper])


def moons(count, seed):
    """Points of the moons, shape (count, 2)."""
    rng = np.random.default_rng(seed)
    clean = arcs(rng.uniform(0, np.pi, count))[rng.integers(0, 2, count), np.arange(count)]
    return jnp.asarray((clean + NOISE * rng.normal(size=(count, 2))) / SCALE, dtype=float)


def true_log_prob(points, nodes=4000):
    """log density of the moons: a mean of normal laws along the arcs."""
    centers = arcs((np.arange(nodes) + 0.5) * np.pi / nodes).reshape(-1, 2) / SCALE
    width = NOISE / SCALE

    def of_one(x):
        exponents = -jnp.sum((x[None] - centers) ** 2, axis=1) / (2 * width**2)
        return jax.nn.logsumexp(exponents) - jnp.log(len(centers) * 2 * np.pi * width**2)

    return jax.lax.map(of_one, points, batch_size=64)


def make_flow(seed, **numerics):
    """An untrained flow."""
    field = nde.fields.MLPField(
        2, WIDTH, 3, time=True, activation=jax.nn.silu, final_activation=unbounded,
        key=jax.random.key(seed),
    )  # fmt: skip
    return nde.CNF(field, Normal(2), **numerics)


def unbounded(x):
    """The end of a network that may have any speed: thin moons need much at the end."""
    return x


def train(method, steps, seed=0):
    """A trained flow, and its history."""
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    return nde.fit(
        make_flow(seed, **TRAINING), LOSSES[method], moons(100_000, seed),
        optim=optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule, b2=0.99)),
        steps=steps, batch_size=BATCH[method], progress=False, key=jax.random.key(seed + 1),
    )  # fmt: skip


def steps_in(seconds, method):
    """How many steps of a method fit into so many seconds."""
    _, history = train(method, 40)
    each = (history["seconds"][-1] - history["seconds"][9]) / 30
    return max(40, int(seconds / each))


@eqx.filter_jit
def log_probs(model, points):
    """Exact log densities of many points."""
    judged = nde.CNF(model.vector_field, model.base, **JUDGING)
    return jax.vmap(judged.log_prob)(points)


@eqx.filter_jit
def ways(model, keys):
    """The ways of samples, shape (samples, times, 2), and the evaluations of each."""
    quick = nde.CNF(model.vector_field, model.base, **SAMPLING)

    def one(key):
        solution = quick.solve(jnp.linspace(0.0, 1.0, 17), quick.base.sample(key))
        return solution.ys, solution.stats["nfe"]

    return jax.vmap(one)(keys)


def report(model, history, held, floor):
    """Nats above the floor with its error, evaluations of a sample, straightness, seconds."""
    excess = floor - np.asarray(log_probs(model, held))
    keys = jax.random.split(jax.random.key(7), 512)
    judged = nde.CNF(model.vector_field, model.base, **JUDGING)
    bent, _ = eqx.filter_jit(straightness)(judged, keys)
    return {
        "excess": excess.mean(),
        "error": excess.std() / np.sqrt(len(excess)),
        "nfe": float(jnp.mean(ways(model, keys)[1].astype(float))),
        "straightness": float(bent),
        "steps": len(history),
        "seconds": history.seconds,
    }


def memory(adjoint, steps=128, batch=256):
    """Bytes that one gradient of the likelihood needs besides its arguments, with so many steps."""
    numerics = TRAINING | {"adjoint": adjoint, "dt0": 1 / steps, "max_steps": steps}
    model, points = make_flow(0, **numerics), moons(batch, 0)
    loss = lambda model, points: -jnp.mean(jax.vmap(model.log_prob)(points))
    lowered = eqx.filter_jit(eqx.filter_grad(loss)).lower(model, points)
    return lowered.compile().compiled.memory_analysis().temp_size_in_bytes


def table(results, floor):
    """One row per method."""
    lines = [
        f"entropy of the moons, on the same points: {floor:.3f} nats",
        f"{'':<14}{'excess, nats':>18}{'NFE':>8}{'straightness':>14}{'steps':>8}{'seconds':>9}",
    ]
    for name, row in results.items():
        excess = f"{row['excess']:.3f} +- {row['error']:.3f}"
        costs = f"{row['steps']:>8}{row['seconds']:>9.1f}"
        lines.append(f"{name:<14}{excess:>18}{row['nfe']:>8.1f}{row['straightness']:>14.3f}{costs}")
    return "\n".join(lines)


def picture(models):
    """Densities, and the ways of some samples."""
    import matplotlib.pyplot as plt

    x, y = np.meshgrid(np.linspace(-2.2, 3.6, 150), np.linspace(-1.7, 2.3, 110))
    grid = jnp.asarray(np.stack([x, y], axis=-1).reshape(-1, 2), dtype=float)
    fig, axes = plt.subplots(1, len(models), figsize=(11, 3), layout="constrained")
    for ax, (name, model) in zip(np.atleast_1d(axes), models.items(), strict=True):
        density = np.exp(np.asarray(log_probs(model, grid))).reshape(x.shape)
        ax.pcolormesh(x, y, density, cmap="Blues", vmin=0, vmax=0.9, rasterized=True)
        paths, _ = ways(model, jax.random.split(jax.random.key(8), 60))
        ax.plot(*np.moveaxis(np.asarray(paths), 2, 0).swapaxes(1, 2), color="#EE7733", lw=0.5)
        ax.set(title=name, xlim=(-2.2, 3.6), ylim=(-1.7, 2.3), aspect="equal", xticks=[], yticks=[])
    nde.plot.save(fig, "flow_moons.png")


def main(
    seconds: float = 25.0,
    plot: bool = True,
    *,
    methods: tuple = tuple(LOSSES),
    steps: int | None = None,
    points: int = 2000,
) -> dict:
    """Train each way for so many seconds (or steps), print the table, save the picture."""
    held = moons(points, seed=99)
    true = np.asarray(true_log_prob(held))
    results, models = {}, {}
    for name in methods:
        count = steps_in(seconds, name) if steps is None else steps
        models[name], history = train(name, count)
        results[name] = report(models[name], history, held, true)
    print(table(results, -true.mean()))
    for name, row in results.items():
        assert row["excess"] > -3 * row["error"], f"{name} is below the entropy: a wrong density"
        if name == "independent" and row["steps"] >= 10_000:
            assert row["excess"] < 0.1, row
    if "likelihood" in methods:
        ours, theirs = map(memory, (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint()))
        print(
            f"memory of a gradient through 128 steps: {ours / 1e6:.2f} MB with ReversibleAdjoint, "
            f"{theirs / 1e6:.2f} MB with diffrax's default"
        )
    if plot:
        picture(models)
    return results


# *What to take away*: without a solve matching takes many more steps in the same time, and is nearer
# to the floor; optimal pairs make the ways straight, so that samples are cheap.
# *Next*: conditions and images, `conditional_flow_digits.py`.

if __name__ == "__main__":
    main()

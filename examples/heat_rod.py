"""# A rod that heats itself: the heat equation with an unknown source

    u_t = kappa u_xx + s(u),      no heat through the ends

by the method of lines: one state for each of 256 points. The law of the source s is unknown, a small
network that is the same at every point, trained through the solve. The truth, s = u (1 - u) (u - a),
lets hot spots spread and cold ones die.

The gradient needs every state of the solve again. diffrax's default, `RecursiveCheckpointAdjoint`,
stores some and computes the others anew; `ReversibleAdjoint` undoes the steps of a reversible solver and,
with `checkpoint_every=None`, stores none. Both go through 4096 steps; memory and gradients are compared.

*Gotcha: heat that flows backwards blows up. `EES25` undoes a step up to O(h^6), and on the way back what
is left over grows by exp(4 kappa T / dx^2) = e^20 at most. Over 4096 small steps that does no harm; over
the 64 of training it can cost the gradient a percent, so there the reversal restarts from every 16th
state. `drift` measures it. And `Reversible(Bosh3())` is unstable for diffusion.*
Reference: Efficient, accurate and stable gradients for neural ODEs (2024) | arXiv:2410.11648
"""

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.solvers import EES25, ReversibleAdjoint

jax.config.update("jax_enable_x64", True)

POINTS = 256
X = (np.arange(POINTS) + 0.5) / POINTS
END = 8.0  # s
STEPS, MANY = 64, 4096  # of a solve to train on, and of one whose memory is compared
KAPPA = 20.0 / 4.0 / END / POINTS**2  # of a rod of length one, per s
THRESHOLD, NOISE = 0.3, 0.01
TS = jnp.linspace(0.0, END, 9)
START = sum(
    height * jnp.exp(-(((X - x) / 0.06) ** 2))
    for x, height in ((0.15, 0.28), (0.38, 0.5), (0.62, 1.2), (0.85, 0.75))
)


def true_source(t, scaled, args):
    u = (scaled + 2.0) / 4.0
    return u * (1.0 - u) * (u - THRESHOLD)


def strength(source, u):
    """s(u) at every point; a network sees u brought to the range where its units bend."""
    return jax.vmap(lambda v: source(0.0, 4.0 * v[None] - 2.0, None)[0])(u)


def rate(t, u, source):
    """Second differences, and the source at every point."""
    padded = jnp.pad(u, 1, mode="edge")
    curvature = (padded[2:] - 2 * u + padded[:-2]) * POINTS**2
    return KAPPA * curvature + strength(source, u)


def solve(source, steps, adjoint):
    """The rod at `TS`, shape (times, points)."""
    options = {"saveat": diffrax.SaveAt(ts=TS), "max_steps": steps + 8, "adjoint": adjoint}
    term = diffrax.ODETerm(rate)
    return diffrax.diffeqsolve(term, EES25(), 0.0, END, END / steps, START, source, **options)


def loss(source, ys, steps, adjoint):
    return jnp.mean((solve(source, steps, adjoint).ys - ys) ** 2) / NOISE**2


def gradient(source, ys, adjoint):
    """The gradient through many steps, and the temporary bytes of the compiled program."""
    arrays, static = eqx.partition(source, eqx.is_array)
    value = lambda arrays: loss(eqx.combine(arrays, static), ys, MANY, adjoint)
    compiled = jax.jit(jax.grad(value)).lower(arrays).compile()
    flat = np.asarray(jax.flatten_util.ravel_pytree(compiled(arrays))[0])
    return flat, compiled.memory_analysis().temp_size_in_bytes


def train(ys, steps, seed):
    key, adjoint = jax.random.key(seed), ReversibleAdjoint(checkpoint_every=16)
    network = nde.fields.MLPField(1, 16, 1, activation=jax.nn.silu, last_layer_scale=0.1, key=key)
    return nde.fit(
        network,
        lambda source, batch, key: (loss(source, batch.data[0], STEPS, adjoint), {}),
        ys[None],
        optim=optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
        steps=steps,
        progress=False,
        key=key,
    )[0]


def relative(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def picture(u, laws, ys, found):
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(u, laws["truth"], color="0.7", lw=4, label="truth")
    left.plot(u, laws["network"], color="#228833", lw=1.8, label="network")
    left.set(xlabel="u", ylabel="s(u)", title="the source")
    left.legend(frameon=False)
    for row, color in ((0, "#4477AA"), (4, "#EE7733"), (8, "#AA3377")):
        right.plot(X, ys[row], ".", ms=3, color=color)
        right.plot(X, found[row], color=color, label=f"t = {float(TS[row]):.0f}")
    right.set(xlabel="x", ylabel="u", title="measured, and the model")
    right.legend(frameon=False)
    nde.plot.save(fig, "heat_rod.png")


def main(steps: int = 800, plot: bool = True, *, seed: int = 0) -> dict:
    """The error of the source, how well steps are undone, two gradients and their memory."""
    clean = solve(true_source, STEPS, ReversibleAdjoint()).ys
    ys = clean + NOISE * np.random.default_rng(seed).normal(size=clean.shape)
    source = train(ys, steps, seed)
    u = jnp.linspace(0.0, 1.05, 106)
    laws = {"truth": strength(true_source, u), "network": strength(source, u)}
    off = relative(laws["network"], laws["truth"])
    found = solve(source, STEPS, ReversibleAdjoint(certify=True, checkpoint_every=16))
    drift = float(found.stats["drift"])
    undone, small = gradient(source, ys, ReversibleAdjoint(checkpoint_every=None))
    stored, large = gradient(source, ys, diffrax.RecursiveCheckpointAdjoint())
    apart = relative(undone, stored)
    print(f"source within {off:.1%}; drift {drift:.1e} in 16 of {STEPS} steps")
    print(f"memory of the gradient of {MANY} steps: {small / 1e3:.0f} kB, not {large / 1e3:.0f} kB")
    print(f"the two gradients differ by {apart:.1e}")
    if plot:
        picture(u, laws, ys, found.ys)
    if steps >= 800:  # fewer are a trial of the program
        assert off < 0.15
        assert drift < 1e-6 and apart < 1e-5
        assert small < 0.7 * large
    return {"source": off, "drift": drift, "apart": apart, "memory": small, "default": large}


# *What to take away*: a partial differential equation is a large ODE, and what is unknown in it may be
# as small as a function of one number.

if __name__ == "__main__":
    main()

"""# A formula for what is missing: gravity and friction of a pendulum

What is known of a pendulum is q' = v. What v' is, a network in a hybrid model learns from observed
angles and velocities; evolution reads a formula from that network, and the formula takes its place
in the model:

    q' = v,    v' = network(q, v)   ->   v' = -9.81 sin(q) - 0.25 v

*Gotcha: a pendulum that swings gently is a linear spring, whatever law it follows: the data must go
beyond, here to angles of 2.*

Source: C. Rackauckas et al., Universal Differential Equations (2020) | arXiv:2001.04385.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import symbolic

jax.config.update("jax_enable_x64", True)
TRUTH = symbolic.Field.parse(["v", "-9.81 * sin(q) - 0.25 * v"], ("q", "v"))
# q is an angle; the unit of time is the second.
UNITS = symbolic.Units({"q": (0,), "v": (-1,)}, (-2,))


def hybrid(network):
    """q' = v, v' = network(q, v)."""
    return nde.HybridODE(
        lambda t, y, p: y[1:],
        network,
        {},
        combine=lambda known, network, t, y, p, args: jnp.concatenate(
            [known(t, y, p), network(t, y, args)]
        ),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
    )


def observe(series=8, seed=0):
    """Angles and velocities, at 31 times in 1.5 seconds."""
    ts = jnp.linspace(0.0, 1.5, 31)
    y0s = jax.random.uniform(jax.random.key(seed), (series, 2), minval=-2.0, maxval=2.0)
    truth = nde.NeuralODE(TRUTH, stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8))
    return ts, y0s, jax.vmap(truth, in_axes=(None, 0))(ts, y0s)


def learn(ts, ys, steps, seed):
    """The network, trained on pieces of 6 observations each, from one observed state to the next ones."""
    starts = np.arange(0, len(ts) - 5, 5)
    pieces = jnp.stack([ys[:, at : at + 6] for at in starts], axis=1).reshape(-1, 6, 2)

    def loss(model, batch, key):
        del key
        solve = lambda piece: model.solve(ts[:6], piece[0], throw=False).ys
        return jnp.mean((jax.vmap(solve)(batch.data) - batch.data) ** 2)

    network = nde.fields.MLPField(
        2,
        width=32,
        depth=2,
        out_size=1,
        scale=10.0,
        final_activation=lambda x: x,
        key=jax.random.key(seed),
    )
    optim = optax.adam(optax.cosine_decay_schedule(1e-2, max(steps, 1)))
    return nde.fit(
        hybrid(network),
        loss,
        pieces,
        optim=optim,
        steps=steps,
        progress=False,
        key=jax.random.key(seed),
    )[0]


def picture(front, model, ts, y0s, ys):
    """Loss against complexity, and the pendulum for four times as long as it was observed."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    axes[0].semilogy(front.complexities, front.losses, "o-")
    chosen = front.choose()
    axes[0].axvline(chosen.complexity, color="tab:orange", lw=1)
    axes[0].set(
        xlabel="tokens", ylabel="loss, of the network's variance", title=str(front.choose())
    )
    axes[0].title.set_fontsize(8)
    longer = jnp.linspace(0.0, 6.0, 121)
    nde.plot.trajectories(longer, model(longer, y0s[0]), (ts, ys[0]), axes[1], labels=["q", "v"])
    nde.plot.save(fig, "pendulum_formula.png")


def main(steps: int = 2000, plot: bool = True, *, generations: int = 60, seed: int = 0) -> dict:
    """The chosen formula, its constants, and the largest error of a forecast to four times the data."""
    ts, y0s, ys = observe()
    trained = learn(ts, ys, steps, seed)
    states = ys[:, ::2].reshape(-1, 2)
    fronts = symbolic.distill(
        trained,
        states,
        variables=("q", "v"),
        operators=("+", "-", "*", "sin"),
        length=12,
        units=UNITS,
        generations=generations,
        progress=False,
        key=jax.random.key(seed),
    )
    print(fronts[0].table())
    refined = symbolic.refine(fronts, hybrid, ts, y0s, ys)
    print(refined.table())
    model = refined.model()
    longer = jnp.linspace(0.0, 4 * ts[-1], 61)
    exact = nde.NeuralODE(TRUTH, stepsize_controller=model.stepsize_controller)
    errors = jnp.abs(model(longer, y0s[0]) - exact(longer, y0s[0]))
    (formula,) = model.network.expressions
    if plot:
        picture(fronts[0], model, ts, y0s, ys)
    return {
        "formula": str(formula),
        "constants": np.sort(np.abs(np.asarray(formula.constants))).tolist(),
        "forecast_error": float(jnp.max(errors)),
    }


# *What to take away*: the formula replaces the network where it stands, and what is known stays as it is;
# it forecasts where the network was never trained. *Next*: `toggle_steady_state.py`.

if __name__ == "__main__":
    print(main())

"""# A stirred tank: stiff balances, an unknown rate of reaction

A -> X -> B releases heat in a stirred tank with a cooling jacket. With c the concentration of A, T the
temperature, J(t) that of the jacket, switched at known times, and z = k2 [X] the rate at which the
short-lived X reacts on and releases the heat,

    c' = q (1 - c) - k(T) c,   z' = k2 (k(T) c - z) - q z,   T' = q (350 - T) + H z + U (J(t) - T).

All constants are known but the law k(T). It is k0 exp(-E / RT); a network of the temperature takes its
place, log k(T), bounded. c and T of two runs are measured with noise; X is never seen. The judge is a
jacket programme that was not run.

X lives for 1 / k2, a fiftieth of a second; a run takes eight minutes. Steps of an explicit solver are
about 3 / k2 at most, however smooth the solution. Those of `Kvaerno3`, implicit, are not bound by it.
Its equations are solved by `Chord`: the default gives up sooner and takes up to four times the steps.

*Gotcha: the jacket jumps; `jumps` ends the steps there, or one across would lose its order. log k is nearly
straight: units that are straight far away (`silu`) carry it to the ends, where little was measured.*
Reference: Seborg, Edgar and Mellichamp, Process Dynamics and Control (constants; weaker feed, X added).
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix

import nde
from nde.hybrid import Frozen

jax.config.update("jax_enable_x64", True)

# Per minute, but H: K per mol/L
CONSTANTS = {"q": Frozen(1.0), "H": Frozen(100.0), "U": Frozen(2.092), "k2": Frozen(3000.0)}
FEED, WIDTH = 350.0, 50.0  # K; the state is (c, (T - FEED) / WIDTH, z)
NOISE = 0.02  # mol/L, and 1 K
END, SWITCH = 8.0, 2.0  # min
TS = np.linspace(0.04, END, 200)
# K, each for two minutes; one row per run, the last of which is not measured
JACKETS = np.array([[300.0, 340, 310, 360], [350, 300, 370, 320], [330, 365, 305, 345]])
START = jnp.array([0.5, 0.0, 0.0])
IMPLICIT = diffrax.Kvaerno3(root_finder=diffrax.with_stepsize_controller_tols(optimistix.Chord)())


def balances(t, y, p):
    c, temperature, z = y[0], FEED + WIDTH * y[1], y[2]
    reacted = p["k"] * c
    heated = p["q"] * (FEED - temperature) + p["H"] * z + p["U"] * (p["J"] - temperature)
    formed = p["k2"] * (reacted - z) - p["q"] * z
    return jnp.stack([p["q"] * (1.0 - c) - reacted, heated / WIDTH, formed])


def reacting(known, network, t, y, p, jacket):
    return known(t, y, p | {"k": rate(network, y[1]), "J": jacket.evaluate(t)[0]})


def rate(network, scaled):
    return jnp.exp(network(0.0, scaled[None], None)[0])  # per minute


def arrhenius(t, scaled, args):
    """log k, in the place of the network."""
    return jnp.log(7.2e10) - 8750.0 / (FEED + WIDTH * scaled)


def tank(network, solver=IMPLICIT):
    numerics = {"solver": solver, "stepsize_controller": diffrax.PIDController(3e-3, 1e-4)}
    ode = nde.HybridODE(balances, network, CONSTANTS, combine=reacting, **numerics)
    return nde.Measured(ode, Frozen(START), lambda t, y, p, x: y[:2], nde.measured.Gaussian(NOISE))


def steps_taken(solver):
    jacket = nde.paths.held(np.array([0.0, SWITCH]), np.array([JACKETS[0, :1]] * 2))
    ode = tank(arrhenius, solver).ode
    return int(ode.solve(jnp.array([0.0, SWITCH]), START, jacket).stats["num_steps"])


def runs(jackets, ts, ys):
    edges = np.arange(0.0, END + SWITCH, SWITCH)
    held = [nde.paths.held(edges, np.append(row, row[-1])[:, None]) for row in jackets]
    jumps = [edges[1:-1]] * len(held)
    return nde.measured.experiments([(ts, y) for y in ys], args=held, t0=0.0, jumps=jumps)


def courses(network, jackets):
    """c and T of runs with these jackets, at `TS`."""
    return np.asarray(jax.vmap(tank(network))(runs(jackets, TS, np.zeros((len(jackets), 200, 2)))))


def train(data, steps, seed):
    """On a beginning of the runs that grows to all of them."""
    key, small = jax.random.key(seed), {"activation": jax.nn.silu, "last_layer_scale": 0.1}
    network = nde.fields.MLPField(1, 8, 2, scale=10.0, key=key, **small)
    grow = optax.linear_schedule(0.1, 1.0, steps // 2)
    likelihood = functools.partial(nde.losses.negative_log_likelihood, horizon=grow)
    options = {"optim": optax.adam(optax.cosine_decay_schedule(2e-2, steps)), "steps": steps}
    return nde.fit(tank(network), likelihood, data, progress=False, key=key, **options)[0]


def picture(kelvin, laws, ts, ys, new):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, style in (("truth", {"color": "0.7", "lw": 4}), ("network", {"color": "#228833"})):
        axes[0].plot(kelvin, laws[name], label=name, **style)
        axes[2].plot(TS, FEED + WIDTH * new[name], label=name, **style)
    axes[0].legend(frameon=False)
    axes[0].set(yscale="log", xlabel="T, K", ylabel="k, 1/min", title="the law")
    for y, color in zip(ys, ("#4477AA", "#EE7733"), strict=True):
        axes[1].plot(ts, FEED + WIDTH * y[:, 1], ".-", lw=0.6, ms=3, color=color)
    for ax, title in zip(axes[1:], ("measured runs", "a jacket programme not run"), strict=True):
        ax.set(title=title, xlabel="t, min", ylabel="T, K")
    nde.plot.save(fig, "reactor.png")


def main(steps: int = 200, plot: bool = True, *, seed: int = 0) -> dict:
    """The error of the law where it was visited, that of the forecast, and the steps of two solvers."""
    true = courses(arrhenius, JACKETS)
    noise = NOISE * np.random.default_rng(seed).normal(size=(2, 100, 2))
    ts, ys = TS[1::2], true[:2, 1::2] + noise  # every 4.8 seconds
    network = train(runs(JACKETS[:2], ts, ys), steps, seed).ode.network
    seen = np.linspace(true[:2, :, 1].min(), true[:2, :, 1].max(), 101)
    law = lambda field: np.asarray(jax.vmap(functools.partial(rate, field))(jnp.asarray(seen)))
    laws = {"truth": law(arrhenius), "network": law(network)}
    new = {"truth": true[2, :, 1], "network": courses(network, JACKETS[2:])[0, :, 1]}
    kelvin, off = FEED + WIDTH * seen, laws["network"] / laws["truth"] - 1
    low, high = np.quantile(ys[..., 1], [0.02, 0.98])
    inner = (low <= seen) & (seen <= high)
    worst = float(np.max(np.abs(off[inner])))
    forecast = WIDTH * float(np.sqrt(np.mean((new["network"] - new["truth"]) ** 2)))
    taken = {type(s).__name__: steps_taken(s) for s in (diffrax.Tsit5(), IMPLICIT)}
    print(f"two minutes of the truth: {taken} steps")
    print(f"k within {worst:.1%} from {kelvin[inner][0]:.0f} to {kelvin[inner][-1]:.0f} K")
    print(f"off by {off[0]:+.1%} at {kelvin[0]:.0f} K and {off[-1]:+.1%} at {kelvin[-1]:.0f} K")
    print(f"jacket programme not run: T within {forecast:.2f} K (rms)")
    if plot:
        picture(kelvin, laws, ts, ys, new)
    if steps >= 200:  # fewer are a trial of the program
        assert taken["Tsit5"] > 20 * taken["Kvaerno3"], "stiff"
        assert worst < 0.35 and forecast < 1.0
    return {"law": worst, "forecast": forecast, "steps": taken}


# *What to take away*: a law inside known balances, once learned, goes into the next experiment.

if __name__ == "__main__":
    main()

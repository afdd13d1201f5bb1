"""Adaptive steps of a stochastic solve: they converge on the same path, and leave no bias."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from nde.solvers import BrownianInterval, DiscreteAdjoint

PATHS, DRIFT, NOISE = 256, -0.5, 1.0


def errors(tolerance, seed=0):
    """Of X(1) and X(1)^2, path by path, for dX = a X dt + b X o dW with X(0) = 1."""

    def one(key):
        path = BrownianInterval(0.0, 1.0, (), key)
        terms = dfx.MultiTerm(
            dfx.ODETerm(lambda t, x, args: DRIFT * x),
            dfx.ControlTerm(lambda t, x, args: NOISE * x, path),
        )
        # The ends of rejected steps are kept: to forget what was seen there would bias the noise.
        controller = dfx.ClipStepSizeController(
            dfx.PIDController(rtol=tolerance, atol=tolerance), store_rejected_steps=256
        )
        sol = dfx.diffeqsolve(
            terms, dfx.Heun(), 0.0, 1.0, 0.1, jnp.array(1.0), stepsize_controller=controller,
            adjoint=DiscreteAdjoint(), max_steps=4096,
        )  # fmt: skip
        exact = jnp.exp(DRIFT + NOISE * path.evaluate(0.0, 1.0))
        found = sol.ys[-1]
        return found - exact, found**2 - exact**2, sol.stats["num_accepted_steps"]

    return [
        np.asarray(x) for x in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), PATHS))
    ]


def test_paths_converge_and_moments_are_unbiased():
    results = [errors(tolerance) for tolerance in (1e-1, 1e-2, 1e-3)]
    rms = [np.sqrt(np.mean(e**2)) for e, _, _ in results]
    steps = [np.mean(n) for _, _, n in results]
    assert rms[0] > 3 * rms[1] > 9 * rms[2], rms
    assert steps[0] < steps[1] < steps[2]
    bias = [abs(np.mean(m)) for _, m, _ in results]
    spread = np.std(results[-1][1]) / np.sqrt(PATHS)
    assert bias[-1] < 4 * spread + 1e-3 and bias[-1] < bias[0] / 10, (bias, spread)

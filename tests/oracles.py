"""What several tests of the engine share: a field with parameters, a solve, and how to compare."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from nde.solvers import DiscreteAdjoint

PARAMS = {
    "w": jnp.array([[0.4, 1.5, -0.2], [-1.6, -0.3, 0.7], [0.3, -0.5, 0.1]]),
    "b": jnp.array([0.1, -0.2, 0.3]),
}
Y0 = jnp.array([0.8, -0.4, 0.5])
ADAPTIVE = dfx.PIDController(rtol=1e-5, atol=1e-7)
CONSTANT = dfx.ConstantStepSize()
OURS, DIFFRAX = DiscreteAdjoint(), dfx.RecursiveCheckpointAdjoint()


def field(t, y, args):
    return jnp.tanh(args["w"] @ y + args["b"] * jnp.sin(3.0 * t)) - 0.1 * y


def solve(y0=Y0, args=PARAMS, *, vector_field=field, t0=0.0, t1=1.0, **options):
    """One solve with our adjoint, adaptive unless told otherwise."""
    defaults = dict(dt0=0.05, solver=dfx.Tsit5(), adjoint=OURS, max_steps=256)
    options = defaults | dict(stepsize_controller=ADAPTIVE) | options
    return dfx.diffeqsolve(dfx.ODETerm(vector_field), t0=t0, t1=t1, y0=y0, args=args, **options)


def relative(got, want):
    """The largest difference of two pytrees, leaf by leaf in units of the largest entry."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = np.max(np.abs(b), initial=0.0) + 1e-30
        worst = max(worst, float(np.max(np.abs(a - b), initial=0.0) / scale))
    return worst


def weigh(ys):
    """A loss that notices every saved number, and ignores rows that were not reached."""
    total = 0.0
    for leaf in jax.tree.leaves(ys):
        weights = jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
        reached = jnp.isfinite(leaf)
        total += jnp.sum(jnp.where(reached, weights * jnp.sin(jnp.where(reached, leaf, 0.0)), 0.0))
    return total

"""What the tests of the reversible solvers share: one of each kind, a base method, there and back."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from problems import Problem, terms

from nde.solvers import (
    EES25,
    EES27,
    AsynchronousLeapfrog,
    Reversible,
    ReversibleHeun,
    StormerVerlet,
    Yoshida4,
)

SOLVERS = {
    "ReversibleHeun": ReversibleHeun(),
    "ALF": AsynchronousLeapfrog(),
    "Reversible(Midpoint)": Reversible(diffrax.Midpoint()),
    "Reversible(Bosh3)": Reversible(diffrax.Bosh3(), 0.99),
    "Reversible(Tsit5)": Reversible(diffrax.Tsit5()),
    "EES25": EES25(),
    "EES27": EES27(),
    "StormerVerlet": StormerVerlet(),
    "Yoshida4": Yoshida4(),
}


class RK4(diffrax.AbstractERK):
    """The classical method, without an error estimate."""

    tableau = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


def there_and_back(solver, problem: Problem, steps: int, dtype=jnp.float64):
    """(y at the end, y that came back to the start)."""
    its_terms = terms(problem)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    y0, params = cast(problem.y0), cast(problem.params)
    ts = (problem.t1 * jnp.arange(steps + 1.0) / steps).astype(dtype)

    def forward(i, carry):
        y, state = carry
        y, _, _, state, _ = solver.step(its_terms, ts[i], ts[i + 1], y, params, state, False)
        return y, state

    def backward(i, carry):
        k = steps - 1 - i
        return solver.unstep(its_terms, ts[k], ts[k + 1], *carry, params, False)

    @jax.jit
    def run():
        state = solver.init(its_terms, ts[0], ts[1], y0, params)
        end = jax.lax.fori_loop(0, steps, forward, (y0, state))
        return end[0], jax.lax.fori_loop(0, steps, backward, end)[0]

    return run()

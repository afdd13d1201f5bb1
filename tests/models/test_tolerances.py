"""Tolerances may be numbers, arrays, or traced."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nde


@pytest.mark.parametrize("of", ["error", "stiffness"])
def test_local_measures_in_units_of_traced_tolerances(of):
    ts, y0, key = jnp.linspace(0.0, 1.0, 5), jnp.array([1.0, 0.5]), jax.random.key(0)

    def penalty(rtol, atol):
        model = nde.NeuralODE(
            lambda t, y, args: jnp.array([y[1], -jnp.sin(3 * y[0])]),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        )
        return nde.regularizers.local(model, ts, y0, key=key, of=of)[1]

    expected = penalty(1e-3, 1e-3)
    assert expected > 0
    for rtol, atol in ((jnp.asarray(1e-3), jnp.asarray(1e-3)), (jnp.asarray(1e-3), 1e-3)):
        np.testing.assert_allclose(eqx.filter_jit(penalty)(rtol, atol), expected, rtol=1e-6)

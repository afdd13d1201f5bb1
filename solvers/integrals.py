"""Integrals that ride along with a solve: q' = integrand(t, y, args) beside any terms."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp


class _Beside(diffrax.AbstractTerm):
    term: diffrax.AbstractTerm
    integrand: Callable

    def vf(self, t, y, args):
        return self.term.vf(t, y[0], args), self.integrand(t, y[0], args)

    def contr(self, t0, t1, **kwargs):
        return self.term.contr(t0, t1, **kwargs), t1 - t0

    def prod(self, vf, control):
        return self.term.prod(vf[0], control[0]), jax.tree.map(lambda a: a * control[1], vf[1])


class _First(eqx.Module):
    norm: Callable

    def __call__(self, error):
        return self.norm(error[0])


class _Field(eqx.Module):
    vector_field: Callable
    integrand: Callable

    def __call__(self, t, y, args):
        return self.vector_field(t, y[0], args), self.integrand(t, y[0], args)


def ride_along(terms, y0, stepsize_controller, integrand, *, t0, args, noise=None) -> Any:
    del noise
    shape = eqx.filter_eval_shape(integrand, t0, y0, args)
    q0 = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    import dataclasses

    def blind(c):
        if isinstance(c, diffrax.ClipStepSizeController):
            return dataclasses.replace(c, controller=blind(c.controller))
        if isinstance(c, diffrax.PIDController):
            return dataclasses.replace(c, norm=_First(c.norm))
        return c

    if isinstance(terms, diffrax.ODETerm):
        return (
            diffrax.ODETerm(_Field(terms.vector_field, integrand)),
            (y0, q0),
            blind(stepsize_controller),
        )
    return _Beside(terms, integrand), (y0, q0), blind(stepsize_controller)

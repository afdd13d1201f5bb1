r"""SOSRI: adaptive stochastic Runge-Kutta of strong order 1.5 for Ito equations with diagonal
noise.

With W and the space-time Levy area H of a step of length h, q = sqrt(h) and four stages,

    chi1 = (W^2 - h)/(2 q)        chi2 = W/2 + H        chi3 = (W^3 - 3 h W)/(6 h)
    u_i  = y0 + h sum_j a0_ij k_j + chi2 sum_j b0_ij g_j        k_i = f(t0 + c0_i h, u_i)
    v_i  = y0 + h sum_j a1_ij k_j + q    sum_j b1_ij g_j        g_i = g(t0 + c1_i h, v_i)        j < i
    y1   = y0 + h sum_i alpha_i k_i + sum_i (beta1_i W + beta2_i chi1 + beta3_i chi2 + beta4_i chi3) g_i

    error = h (sum_i alpha_i k_i - k_1) + chi2 sum_i beta3_i g_i + chi3 sum_i beta4_i g_i

The error estimate compares with an Euler step of the drift and falls as h^(3/2). The published one, with
h sum_i k_i in the place of the first sum, is O(h): it measures the drift's increment, not its error.

In code:    chi1, chi2, chi3 -> one array each, of the shape of W    a0, b0, .. -> the rows of the tableau
Cost:       4 evaluations of drift and diffusion. SOSRI has c0_2 < 0 and c0_4 > 1: its drift is
            evaluated outside the step. SOSRI2 has c0_3 = c0_4 = 1: the stiffness estimate
            |k_4 - k_3| / |u_4 - u_3| (`estimates`), from numbers that are there.
Not for:    noise where g_i depends on components of y other than y_i: strong order 0.5 there. Stratonovich.
Reference:  Stability-optimized high order methods and stiffness detection for pathwise stiff SDEs (2018)
            | arXiv:1804.04344
"""

import math
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from nde.solvers.integrals import riding, without_integral
from nde.solvers.methods.declared import AbstractDeclaring, Declared
from nde.solvers.trees import add, combine, stack

Row = tuple[float, ...]


class SRITableau(NamedTuple):
    """Coefficients of the module's equations; row i of a0, b0, a1 and b1 has i entries, from 0."""

    a0: tuple[Row, ...]
    b0: tuple[Row, ...]
    a1: tuple[Row, ...]
    b1: tuple[Row, ...]
    alpha: Row
    beta1: Row
    beta2: Row
    beta3: Row
    beta4: Row

    def stage_difference(self) -> Row:
        """u_4 - u_3 as weights of the increments chi2 g_1, chi2 g_2, chi2 g_3, h k_1, .., h k_4."""
        noise = [x - y for x, y in zip(self.b0[3], (*self.b0[2], 0.0), strict=True)]
        drift = [x - y for x, y in zip(self.a0[3], (*self.a0[2], 0.0), strict=True)]
        return (*noise, *drift, 0.0)


SOSRI_TABLEAU = SRITableau(
    a0=(
        (),
        (-0.04199224421316468,),
        (2.842612915017106, -2.0527723684000727),
        (4.338237071435815, -2.8895936137439793, 2.3017575594644466),
    ),
    b0=(
        (),
        (-0.21641093549612528,),
        (1.5336352863679572, 0.26066223492647056),
        (-1.0536037558179159, 1.7015284721089472, -0.20725685784180017),
    ),
    a1=(
        (),
        (0.26204282091330466,),
        (0.20903646383505375, -0.1502377115150361),
        (0.05836595312746999, 0.6149440396332373, 0.08535117634046772),
    ),
    b1=(
        (),
        (-0.5119011827621657,),
        (2.67767339866713, -4.9395031322250995),
        (0.15580956238299215, 3.2361551006624674, -1.4223118283355949),
    ),
    alpha=(1.140099274172029, -0.6401334255743456, 0.4736296532772559, 0.026404498125060714),
    beta1=(-1.8453464565104432, 2.688764531100726, -0.2523866501071323, 0.40896857551684956),
    beta2=(0.4969658141589478, -0.5771202869753592, -0.12919702470322217, 0.2093514975196336),
    beta3=(2.8453464565104425, -2.688764531100725, 0.2523866501071322, -0.40896857551684945),
    beta4=(0.11522663875443433, -0.57877086147738, 0.2857851028163886, 0.17775911990655704),
)

SOSRI2_TABLEAU = SRITableau(
    a0=(
        (),
        (0.13804532298278663,),
        (0.5818361298250374, 0.4181638701749618),
        (0.4670018408674211, 0.8046204792187386, -0.27162232008616016),
    ),
    b0=(
        (),
        (0.08852381537667678,),
        (1.0317752458971061, 0.4563552922077882),
        (1.73078280444124, -0.46089678470929774, -0.9637509618944188),
    ),
    a1=(
        (),
        (0.45605532163856893,),
        (0.7555807846451692, 0.24441921535482677),
        (0.6981181143266059, 0.3453277086024727, -0.04344582292908241),
    ),
    b1=(
        (),
        (0.6753186815412179,),
        (-0.07452812525785148, -0.49783736486149366),
        (-0.5591906709928903, 0.022696571806569924, -0.8984927888368557),
    ),
    alpha=(-0.15036858140642623, 0.7545275856696072, 0.686995463807979, -0.2911544680711602),
    beta1=(-0.45315689727309133, 0.8330937231303951, 0.3792843195533544, 0.24077885458934192),
    beta2=(-0.4994383733810986, 0.9181786186154077, -0.25613778661003145, -0.16260245862427797),
    beta3=(1.4531568972730915, -0.8330937231303933, -0.3792843195533583, -0.24077885458934023),
    beta4=(-0.4976090683622265, 0.9148155835648892, -1.4102107084476505, 0.9930041932449877),
)


class LinearWithStages(diffrax.AbstractLocalInterpolation):
    """Linear from y0 to y1; `k`, the increments of the step, is there for whoever asks."""

    t0: Array
    t1: Array
    y0: PyTree[Array]
    y1: PyTree[Array]
    k: PyTree[Array]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True):
        line = diffrax.LocalLinearInterpolation(t0=self.t0, t1=self.t1, y0=self.y0, y1=self.y1)
        return line.evaluate(t0, t1, left)


class AbstractSRI(AbstractDeclaring, diffrax.AbstractItoSolver, diffrax.AbstractAdaptiveSolver):
    """A method of the module's form, given by its `tableau`."""

    tableau: eqx.AbstractClassVar[SRITableau]

    term_structure: ClassVar = diffrax.MultiTerm[
        tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]  # type: ignore[type-arg] (any field)
    ]
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms: PyTree):
        del terms
        return 2

    def strong_order(self, terms: PyTree):
        del terms
        return 1.5

    def init(self, terms: PyTree, t0: Any, t1: Any, y0: PyTree, args: Any) -> Float[Array, ""]:
        _, diffusion = terms.terms
        name = type(self).__name__
        increment = jax.eval_shape(lambda: diffusion.contr(t0, t1, use_levy=True))
        if not isinstance(increment, diffrax.AbstractSpaceTimeLevyArea):
            raise ValueError(
                f"{name} was given increments of type {type(increment).__name__}; it needs a Brownian path "
                "with space-time Levy area: levy_area=diffrax.SpaceTimeLevyArea."
            )
        for _ in range(riding(terms)):  # the noise of an integral beside y is not diagonal
            terms, y0 = without_integral(terms), y0[0]
        field = eqx.filter_eval_shape(terms.terms[1].vf, t0, y0, args)
        _check_diagonal(field, y0, increment.W, name)
        # An Ito integral run backwards is another integral. Every step uses the sign, so that the
        # check cannot be dropped as unused.
        sign = jnp.sign(jnp.asarray(terms.terms[0].contr(t0, t1)))
        return eqx.error_if(
            sign,
            sign < 0,
            f"{name} solves Ito equations, which run forwards in time only; for t1 < t0 use a "
            "Stratonovich solver.",
        )

    def step(
        self,
        terms: PyTree,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: PyTree,
        made_jump: Any,
    ):
        del made_jump
        drift, diffusion = terms.terms
        tab = self.tableau
        h = drift.contr(t0, t1)
        bm = diffusion.contr(t0, t1, use_levy=True)
        length = h * solver_state
        # A lane that has ended takes steps of length zero, where a root has no derivative.
        empty = length == 0
        divisor = jnp.where(empty, 1, length)
        chi1, chi2, chi3 = _iterated_integrals(length, divisor, bm)
        root = jnp.where(empty, 0, jnp.sqrt(divisor))
        q = jax.tree.map(lambda w: jnp.full(w.shape, root, w.dtype), bm.W)
        # h k_i, and g_i times what it meets: chi2 in u, q in v, and two sums in y1.
        k, in_u, in_v, low, high = [], [], [], [], []
        for i in range(4):
            c0, c1 = math.fsum(tab.a0[i]), math.fsum(tab.a1[i])
            u = add(y0, combine(tab.a0[i], k), combine(tab.b0[i], in_u))
            k.append(drift.vf_prod(t0 + c0 * (t1 - t0), u, args, h))
            v = add(y0, combine(tab.a1[i], k), combine(tab.b1[i], in_v))
            g = diffusion.vf(t0 + c1 * (t1 - t0), v, args)
            in_u.append(diffusion.prod(g, chi2))
            in_v.append(diffusion.prod(g, q))
            low.append(diffusion.prod(g, combine((tab.beta1[i], tab.beta2[i]), (bm.W, chi1))))
            high.append(diffusion.prod(g, combine((tab.beta3[i], tab.beta4[i]), (chi2, chi3))))
        higher_order = add(*high)
        y1 = add(y0, combine(tab.alpha, k), *low, higher_order)
        error = add(combine((tab.alpha[0] - 1, *tab.alpha[1:]), k), higher_order)
        info = dict(y0=y0, y1=y1)
        if self.interpolation_cls is LinearWithStages:
            info["k"] = stack([*in_u[:3], *k])
        return y1, error, info, solver_state, diffrax.RESULTS.successful

    def func(self, terms: PyTree, t0: Any, y0: PyTree, args: Any) -> Any:
        return terms.vf(t0, y0, args)


class SOSRI(AbstractSRI):
    """Stability-optimized SRI: strong order 1.5, Ito, diagonal noise, adaptive. See the module for
    the equations.

    Call it with `terms=MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))`, where `path` has
    `levy_area=diffrax.SpaceTimeLevyArea` and `diffusion` returns a `lineax.DiagonalLinearOperator`
    whose i-th entry depends on `t` and `y[i]` only (otherwise the strong order is 0.5, and nothing
    can tell), or, for one scalar noise of shape (), an array of the shape of y.

    Raises:
        ValueError: for matrix noise, or a path without space-time Levy area.

    Reference:
        Stability-optimized high order methods and stiffness detection for pathwise stiff SDEs
        (2018) | arXiv:1804.04344
    """

    tableau: ClassVar[SRITableau] = SOSRI_TABLEAU

    @property
    def declared(self) -> Declared:
        return Declared(4, 4)


class SOSRI2(AbstractSRI):
    """SOSRI2: as SOSRI, with a stiffness estimate. Same orders, noise, terms and cost.

    Its last two drift stages share their time, which gives `nde.solvers.Estimates`, `WithEstimates`
    and `nde.regularizers.stiffness_estimate` (SRNSDE) a `stiffness_estimate`, that of the drift.

    Raises:
        ValueError: as for `SOSRI`.

    Reference:
        Stability-optimized high order methods and stiffness detection for pathwise stiff SDEs
        (2018) | arXiv:1804.04344
    """

    tableau: ClassVar[SRITableau] = SOSRI2_TABLEAU
    interpolation_cls: ClassVar = LinearWithStages

    @property
    def declared(self) -> Declared:
        # The limit is the published one; the published coefficients leave the region at 10.453.
        weights = self.tableau.stage_difference()
        return Declared(4, 4, stability_limit=10.6, stage_difference=weights)


def _iterated_integrals(h, divisor, bm):
    """chi1, chi2, chi3, each with the structure of W. `divisor` is h, or 1 where that is 0."""

    def leaf(w: Array, area: Any):
        dt, by = h.astype(w.dtype), divisor.astype(w.dtype)
        chi1 = (w * w - dt) / (2 * jnp.sqrt(by))
        return chi1, w / 2 + area, w * (w * w - 3 * dt) / (6 * by)

    triples = jax.tree.map(leaf, bm.W, bm.H)
    return jax.tree.transpose(jax.tree.structure(bm.W), jax.tree.structure((0, 0, 0)), triples)


def _check_diagonal(field, y0, noise, name) -> None:
    def shapes(tree: PyTree):
        return [jnp.shape(x) for x in jax.tree.leaves(tree)]

    def in_words(shapes: Any):
        return str(shapes[0] if len(shapes) == 1 else shapes)

    channels = shapes(noise)
    if isinstance(field, lx.AbstractLinearOperator):
        takes = shapes(field.in_structure())
        diagonal = lx.is_diagonal(field) and takes == channels
        got = f"a {type(field).__name__} of {in_words(takes)}"
    else:
        diagonal = shapes(field) == shapes(y0) and not any(channels)
        got = f"an array of shape {in_words(shapes(field))}"
    if not diagonal:
        raise ValueError(
            f"{name} needs diagonal noise, but `diffusion` returned {got} for noise of "
            f"shape {in_words(channels)}. Return "
            "lineax.DiagonalLinearOperator(g) with g[i] a function of y[i], or use a solver for matrix "
            "noise: LevyHeun (strong order 1), diffrax.SPaRK or diffrax.EulerHeun (0.5)."
        )

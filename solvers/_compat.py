"""Every name of jax, equinox or diffrax that is not documented for users, each with its reason.

`jax.interpreters` and `jax.extend` are where JAX keeps what a library needs to define a primitive:
`lanes` does, because only a primitive sees the mapped axis before it is differentiated.
"""

# Evaluates a traced step again under another transformation.
from jax.core import ShapedArray as ShapedArray
from jax.core import eval_jaxpr as eval_jaxpr

# One primitive with its own batching, differentiation and lowering rules.
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

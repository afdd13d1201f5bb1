"""What a step reports, packed into one array per type of number.

A step reports a dozen scalars; to hand out and to fetch a dozen arrays takes longer than a small step.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["vectors"], meta_fields=["layout"]
)
@dataclass(frozen=True)
class Packed:
    """Arrays by name, flattened and joined by their type.

    Args:
        vectors: One vector per type; leading axes may come later, by `jax.vmap`.
        layout: Name, type, place in the vector of that type, and shape of each array.
    """

    vectors: dict[str, Shaped[Array, "*starts entries"]]
    layout: tuple[tuple[str, str, int, tuple[int, ...]], ...]

    def unpacked(self) -> dict[str, np.ndarray]:
        """The arrays by name, on the host."""
        vectors = {dtype: np.asarray(vector) for dtype, vector in self.vectors.items()}
        record = {}
        for name, dtype, begin, shape in self.layout:
            vector = vectors[dtype]
            part = vector[..., begin : begin + math.prod(shape)]
            record[name] = part.reshape(vector.shape[:-1] + shape)
        return record


def pack(record: dict[str, Array]) -> Packed:
    """Join the arrays of a record."""
    parts: dict[str, list[Array]] = {}
    layout = []
    for name, array in record.items():
        same = parts.setdefault(str(array.dtype), [])
        layout.append((name, str(array.dtype), sum(x.size for x in same), array.shape))
        same.append(array.reshape(-1))
    vectors = {dtype: jnp.concatenate(arrays) for dtype, arrays in parts.items()}
    return Packed(vectors, tuple(layout))

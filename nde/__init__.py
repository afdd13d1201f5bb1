"""Neural differential equations on JAX."""

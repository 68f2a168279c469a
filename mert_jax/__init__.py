"""mert_jax: pretraining of MERT music models in JAX."""

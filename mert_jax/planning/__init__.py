"""What `python -m mert_jax.plan` is made of."""

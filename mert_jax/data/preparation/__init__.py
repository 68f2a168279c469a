"""The steps of `mert_jax.prepare`: find sources, stage them decoded, select, assemble, report."""

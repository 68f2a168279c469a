"""Plans of a training run: memory, time bounds and estimates from a compiled step."""

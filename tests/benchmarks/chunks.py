"""The effect of chunking a long file: the difference from a single pass over it, by layer and by
distance from the edge of a chunk. The defaults of `extract` come from this table.

python -m tests.benchmarks.chunks --checkpoint=PATH --input=FILE [--seconds=240 --chunk_seconds=60]
"""

import numpy as np
from absl import flags

import mert_jax
from mert_jax import cli
from mert_jax.data.decoding import decode
from mert_jax.errors import UserError
from mert_jax.extraction import embedder

EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds from the edge, where columns begin


def table(
    model: embedder.Model, wave: np.ndarray, chunk: float
) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Return the starts of the columns, and RMS differences by layer and column.

    The differences [layers, columns], by distance from the nearest edge between two chunks, are
    relative to a layer's standard deviation over time. The third value [layers] is the same between
    neighbouring frames of the single pass, for scale.
    """
    (whole,) = model.embed([wave], chunk=len(wave) / model.sample_rate + 1)
    (cut,) = model.embed([wave], chunk=chunk, context=0.0)
    length, frames = round(chunk * model.frame_rate), whole.shape[1]
    inner = np.arange(length, frames - length, length)
    if not len(inner):
        raise UserError(f"{len(wave) / model.sample_rate:.0f} s are not 3 chunks of {chunk:g} s")
    # the last chunk overlaps the one before by more than the others: leave out its frames
    number = np.arange(inner[-1])
    distance = np.abs(number[:, None] + 0.5 - inner).min(1) / model.frame_rate
    spread = np.sqrt(whole.var(1).mean(-1))
    error = np.sqrt(np.square(cut - whole).mean(-1))[:, : len(number)] / spread[:, None]
    begins = [edge for edge in EDGES if edge < chunk / 2]
    column = np.digitize(distance, begins) - 1
    means = [np.sqrt(np.square(error[:, column == i]).mean(1)) for i in range(len(begins))]
    moves = np.sqrt(np.square(np.diff(whole, axis=1)).mean((1, 2))) / spread
    return begins, np.stack(means, 1), moves


def main() -> None:
    """Print the table in Markdown."""
    model = mert_jax.load(_CHECKPOINT.value)
    with decode(_INPUT.value, model.sample_rate) as (_, blocks):
        wave = np.concatenate(list(blocks))[: round(_SECONDS.value * model.sample_rate)]
    begins, means, moves = table(model, wave, _CHUNK.value)
    heads = [f"{edge:g} s" for edge in begins]
    print(f"| layer | {' | '.join(heads)} | from frame to frame |")
    print(f"| --- | {' | '.join('---' for _ in heads)} | --- |")
    for layer, row in enumerate(means):
        print(f"| {layer} | {' | '.join(f'{x:.4f}' for x in row)} | {moves[layer]:.2f} |")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "As extract's.", required=True)
    _INPUT = flags.DEFINE_string("input", None, "An audio file.", required=True)
    _SECONDS = flags.DEFINE_float("seconds", 240.0, "Of the file, embedded in one pass.")
    _CHUNK = flags.DEFINE_float("chunk_seconds", 60.0, "Length of a chunk.")
    cli.run(main)

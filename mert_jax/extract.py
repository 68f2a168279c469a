"""Writes the hidden states of recordings, one file for each recording.

    python -m mert_jax.extract --checkpoint=PATH --input=MUSIC --output=DIR

PATH is a workdir, a Hugging Face MERT directory or a fairseq .pt; MUSIC is a folder, searched
recursively, or audio files of any format, rate and length. DIR/NAME.npz of NAME.mp3 has
`hidden_states` [layers, T, D], `layers` (0 is the encoder's input, l the output of layer l),
`times` (seconds, the middle of each frame) and `frame_rate`. With --pool=mean, `hidden_states` are
means over time [layers, D], and DIR/features.parquet has those of all files.

The command can be stopped and run again: finished files are kept. A file that cannot be used is
reported, the others are embedded, and the exit code is 1; DIR/report.json lists all failures.
"""

from absl import flags

from mert_jax import cli, progress
from mert_jax.errors import UserError
from mert_jax.extraction import folder
from mert_jax.extraction.embedder import EmbeddingSettings

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)
_CHECKPOINT = define.string("checkpoint", None, "Workdir, Hugging Face directory or fairseq file.")
_INPUT = define.multi_string(
    "input", None, "Folders and audio files; repeat the flag or use commas."
)
_OUTPUT = define.string("output", None, "Folder of the results.")
_LAYERS = define.string(
    "layers", "all", "Hidden states: all, 7 or 0,7,12; 0 is the encoder's input."
)
_POOL = define.enum("pool", "none", ["none", "mean"], "Every frame, or the mean over time.")
_DTYPE = define.enum("dtype", "float32", ["float32", "float16"], "Type of the hidden states.")
_CHUNK_SECONDS = define.float(
    "chunk_seconds", 60.0, "Length of the overlapping chunks of longer files.", 1
)
_CONTEXT_SECONDS = define.float(
    "context_seconds", 2.0, "Least audio around each frame of a chunk.", 0
)
_WINDOW_SECONDS = define.float(
    "window_seconds", 0.0, "Windows that count as recordings; 0: none.", 0
)
_BATCH_SECONDS = define.float(
    "batch_seconds", 60.0, "Audio in a batch of a device; more may be faster.", 1
)
flags.mark_flags_as_required(["checkpoint", "input", "output"], FLAGS)


def _layer_numbers(text: str) -> tuple[int, ...]:
    if text == "all":
        return ()
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--layers={text} is not all, a number, or numbers with commas")
    return tuple(dict.fromkeys(map(int, parts)))


def main() -> int:
    settings = EmbeddingSettings(
        layers=_layer_numbers(_LAYERS.value),
        pool=_POOL.value,
        chunk=_CHUNK_SECONDS.value,
        context=_CONTEXT_SECONDS.value,
        window=_WINDOW_SECONDS.value,
        batch=_BATCH_SECONDS.value,
    )
    inputs, output = cli.paths(_INPUT.value), _OUTPUT.value
    try:
        report = folder.extract(_CHECKPOINT.value, inputs, output, settings, _DTYPE.value)
    except KeyboardInterrupt:
        progress.note("stopped; finished files are kept: run the same command again to continue")
        return 130
    print(folder.summary(report, output))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    cli.run(main, FLAGS)

"""Draw the curves and figures of a run: `python -m mert_jax.report --workdir=DIR`.

Reads DIR/metrics.jsonl and DIR/config.json; writes DIR/report.png and DIR/report.html, one file
that opens without a network.
"""

from absl import flags

from mert_jax import cli
from mert_jax.reporting import report

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)
_WORKDIR = define.string("workdir", None, "Folder of the run, as given to train.")


def main() -> None:
    report.write_report(_WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)

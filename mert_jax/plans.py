"""Plans side by side: `python -m mert_jax.plans --plans=a.json,b.json [--picture=scaling.png]`.

Each file is the output of `python -m mert_jax.plan ... > a.json` for a TPU. Prints a Markdown
table; the picture shows how memory and collectives grow with the number of chips.
"""

from absl import flags

from mert_jax import cli
from mert_jax.planning import table

FLAGS = flags.FlagValues()

_PLANS = flags.DEFINE_list(
    "plans", None, "Outputs of plan; patterns such as plans/*.json.", flag_values=FLAGS
)
_PICTURE = flags.DEFINE_string(
    "picture", None, "A .png file to draw the plans into.", flag_values=FLAGS
)


def main() -> None:
    """Print the table and draw the picture."""
    table.print_table(_PLANS.value or [], _PICTURE.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)

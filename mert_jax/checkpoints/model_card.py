"""The model card of an exported checkpoint: its use, licence, training, data and metrics."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from flax import traverse_util

from mert_jax.checkpoints.in_memory import Checkpoint

UNKNOWN = "unknown"
UNLICENSED = (
    "Not stated. Whoever publishes this model must set it: the music it learned from and the "
    "checkpoint it continues may both bind."
)
PRE_NORM = (
    ", but the meaning of the last one depends on transformers: 4.x returns it after the final "
    "layer norm, equal to `last_hidden_state`, 5.x before it. `last_hidden_state` is always after "
    "it"
)


def licence(folder: Path) -> str:
    """Return the licence that the model card in a directory states, "" if it states none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = re.search(r"^license:[ \t]*([\w.\-+]+)", front[1], re.MULTILINE) if front else None
    return stated[1] if stated and stated[1] != UNKNOWN else ""


def text(checkpoint: Checkpoint) -> str:
    """Return the card in Markdown, with the front matter that the hub reads."""
    student, about, step = checkpoint.student, checkpoint.about, checkpoint.step
    norm = "pre-norm" if student.pre_norm else "post-norm"
    settings = traverse_util.flatten_dict(dict(about.config), sep=".")
    recipe = "\n".join(f"{name}: {value}" for name, value in settings.items())
    metrics = [
        {"metric": name, "value": [y and round(y, 4) for y in x] if isinstance(x, list) else x}
        for name, x in about.metrics.items()
    ]
    template = resources.files("mert_jax.checkpoints").joinpath("model_card.md")
    unknown = "the checkpoint does not say."
    return template.read_text("utf-8").format(
        licence=about.licence or UNKNOWN,
        size=f"{student.num_layers} {norm} layers of {student.hidden_size}",
        sample_rate=about.sample_rate,
        frame_rate=about.sample_rate / student.hop_length,
        last_state=PRE_NORM if student.pre_norm else "",
        waves="normalised to mean 0 and variance 1" if about.do_normalize else "as they are",
        normalize=str(about.do_normalize).lower(),
        terms=f"`{about.licence}`" if about.licence else UNLICENSED,
        lineage=f"Goes back to {'; '.join(about.lineage)}.\n\n" if about.lineage else "",
        updates=f"{step:,} updates." if step else "The number of updates is unknown.",
        recipe=f"```\n{recipe}\n```" if about.config else f"The recipe is unknown: {unknown}",
        data=_table(about.data) or f"Unknown: {unknown}",
        metrics=_table(metrics) or "None were kept with the checkpoint.",
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with the columns of the first row, "" without rows."""
    columns = list(rows[0]) if rows else []
    cells = [columns, ["---"] * len(columns)]
    cells += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) if rows else ""

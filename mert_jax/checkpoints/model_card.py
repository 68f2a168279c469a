"""The model card of an exported checkpoint: what it is, what it was trained on and how well."""

import os
import re
from typing import Any

from mert_jax.checkpoints.in_memory import Checkpoint

UNKNOWN = "unknown"
USE = """```python
from transformers import HubertModel, Wav2Vec2FeatureExtractor

model = HubertModel.from_pretrained("THIS_FOLDER").eval()
processor = Wav2Vec2FeatureExtractor.from_pretrained("THIS_FOLDER")
inputs = processor(wave, sampling_rate={sample_rate}, return_tensors="pt")  # wave: mono, in [-1, 1]
outputs = model(**inputs, output_hidden_states=True)
```"""
POST_NORM = (
    "`hidden_states[0]` is the encoder's input and `hidden_states[l]` the output of layer l."
)
PRE_NORM = (
    "`hidden_states[0]` is the encoder's input and `hidden_states[l]` the output of layer l, but "
    "the meaning of the last one depends on transformers: 4.x returns it after the final layer "
    "norm, equal to `last_hidden_state`, 5.x before it. `last_hidden_state` is always after it."
)


def licence(path: str) -> str:
    """The licence that the model card in a directory states, "" where it states none."""
    card = os.path.join(path, "README.md")
    if not os.path.exists(card):
        return ""
    with open(card, encoding="utf-8", errors="replace") as f:
        front = re.match(r"---\n(.*?)\n---", f.read(), re.DOTALL)
    stated = re.search(r"^license:[ \t]*([\w.\-+]+)", front[1], re.MULTILINE) if front else None
    return stated[1] if stated and stated[1] != UNKNOWN else ""


def text(checkpoint: Checkpoint) -> str:
    """The card, in Markdown with the front matter that the hub reads."""
    student, about = checkpoint.student, checkpoint.about
    norm = "pre-norm" if student.pre_norm else "post-norm"
    terms = about.licence or UNKNOWN
    sections = [
        f"---\nlicense: {terms}\nlibrary_name: transformers\npipeline_tag: feature-extraction\n"
        "tags:\n- music\n- audio\n- mert\n---",
        "# A MERT music model",
        f"{student.num_layers} {norm} layers of {student.hidden_size}, {about.sample_rate} Hz mono "
        f"in, {about.sample_rate / student.hop_length:g} frames a second out. Pretrained as in "
        "MERT (arXiv 2306.00107); exported by mert_jax.",
        "## Use",
        USE.format(sample_rate=about.sample_rate),
        PRE_NORM if student.pre_norm else POST_NORM,
        "The model was trained on waves "
        + ("normalised to mean 0 and variance 1" if about.do_normalize else "as they are")
        + f": the processor's `do_normalize` is {str(about.do_normalize).lower()}, and programs "
        "that set it themselves must set it so.",
        "## Licence",
        f"`{about.licence}`"
        if about.licence
        else "Not stated. Whoever publishes this model must set it: the music it learned from and "
        "the checkpoint it continues may both bind.",
        "## Training",
        *([f"Goes back to {'; '.join(about.lineage)}."] if about.lineage else []),
        f"{checkpoint.step:,} updates." if checkpoint.step else "The number of updates is unknown.",
        *_recipe(about.config),
        "## Data",
        *(_table(about.data) if about.data else ["Unknown: the checkpoint does not say."]),
        "## Metrics",
        *_metrics(about.metrics),
    ]
    return "\n\n".join(sections) + "\n"


def _recipe(config: dict[str, Any]) -> list[str]:
    """The settings of the run, one a line, nested ones by dotted names."""
    if not config:
        return ["The recipe is unknown: the checkpoint does not say."]

    def lines(tree: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            line
            for key, value in tree.items()
            for line in (
                lines(value, f"{prefix}{key}.")
                if isinstance(value, dict)
                else [f"{prefix}{key}: {value}"]
            )
        ]

    return ["```\n" + "\n".join(lines(config)) + "\n```"]


def _table(rows: tuple[dict[str, Any], ...]) -> list[str]:
    columns = list(rows[0])
    head = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    body = ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    return ["\n".join(head + body)]


def _metrics(row: dict[str, Any]) -> list[str]:
    if not row:
        return ["None were kept with the checkpoint."]
    shown = lambda x: (
        [round(y, 4) if y is not None else None for y in x] if isinstance(x, list) else x
    )
    rows = tuple({"metric": name, "value": shown(value)} for name, value in row.items())
    return _table(rows)

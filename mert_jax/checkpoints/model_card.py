"""The model card of an exported checkpoint: its use, licence, training, data and metrics."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from mert_jax.checkpoints.in_memory import Checkpoint

UNKNOWN = "unknown"
USE = """```python
from transformers import HubertModel, Wav2Vec2FeatureExtractor

model = HubertModel.from_pretrained("THIS_FOLDER").eval()
processor = Wav2Vec2FeatureExtractor.from_pretrained("THIS_FOLDER")
inputs = processor(wave, sampling_rate={sample_rate}, return_tensors="pt")  # wave: mono, in [-1, 1]
outputs = model(**inputs, output_hidden_states=True)
```"""
STATES = "`hidden_states[0]` is the encoder's input and `hidden_states[l]` the output of layer l"
PRE_NORM = (
    ", but the meaning of the last one depends on transformers: 4.x returns it after the final "
    "layer norm, equal to `last_hidden_state`, 5.x before it. `last_hidden_state` is always after "
    "it"
)


def licence(path: str) -> str:
    """Return the licence that the model card in a directory states, "" if it states none."""
    card = os.path.join(path, "README.md")
    if not os.path.exists(card):
        return ""
    with open(card, encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(), re.DOTALL)
    stated = re.search(r"^license:[ \t]*([\w.\-+]+)", front[1], re.MULTILINE) if front else None
    return stated[1] if stated and stated[1] != UNKNOWN else ""


def text(checkpoint: Checkpoint) -> str:
    """Return the card in Markdown, with the front matter that the hub reads."""
    student, about = checkpoint.student, checkpoint.about
    norm = "pre-norm" if student.pre_norm else "post-norm"
    waves = "normalised to mean 0 and variance 1" if about.do_normalize else "as they are"
    settings = traverse_util.flatten_dict(dict(about.config), sep=".")
    recipe = "\n".join(f"{name}: {value}" for name, value in settings.items())
    metrics = [{"metric": name, "value": _rounded(x)} for name, x in about.metrics.items()]
    sections = [
        f"---\nlicense: {about.licence or UNKNOWN}\nlibrary_name: transformers\n"
        "pipeline_tag: feature-extraction\ntags:\n- music\n- audio\n- mert\n---",
        "# A MERT music model",
        f"{student.num_layers} {norm} layers of {student.hidden_size}, {about.sample_rate} Hz mono "
        f"in, {about.sample_rate / student.hop_length:g} frames a second out. Pretrained as in "
        "MERT (arXiv 2306.00107); exported by mert_jax.",
        "## Use",
        USE.format(sample_rate=about.sample_rate),
        f"{STATES}{PRE_NORM if student.pre_norm else ''}.",
        f"The model was trained on waves {waves}: the processor's `do_normalize` is "
        f"{str(about.do_normalize).lower()}, and programs that set it themselves must set it so.",
        "## Licence",
        f"`{about.licence}`"
        if about.licence
        else "Not stated. Whoever publishes this model must set it: the music it learned from and "
        "the checkpoint it continues may both bind.",
        "## Training",
        *([f"Goes back to {'; '.join(about.lineage)}."] if about.lineage else []),
        f"{checkpoint.step:,} updates." if checkpoint.step else "The number of updates is unknown.",
        f"```\n{recipe}\n```"
        if about.config
        else "The recipe is unknown: the checkpoint does not say.",
        "## Data",
        _table(about.data) or "Unknown: the checkpoint does not say.",
        "## Metrics",
        _table(metrics) or "None were kept with the checkpoint.",
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with the columns of the first row, "" without rows."""
    columns = list(rows[0]) if rows else []
    cells = [columns, ["---"] * len(columns)]
    cells += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) if rows else ""


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [x if x is None else round(x, 4) for x in value]
    return value

"""Hugging Face directories of MERT, read and written for transformers' stock `HubertModel`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mert_jax.checkpoints import model_card, tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.tensors import state_dict

# settings, the field of Student that each one names, and transformers' default, which config.json
# need not repeat (huggingface/transformers, `configuration_hubert.py`)
FIELDS = dict(
    hidden_size=("hidden_size", 768),
    num_hidden_layers=("num_layers", 12),
    num_attention_heads=("num_heads", 12),
    intermediate_size=("intermediate_size", 3072),
    do_stable_layer_norm=("pre_norm", False),
    num_conv_pos_embeddings=("pos_conv_kernel", 128),
    num_conv_pos_embedding_groups=("pos_conv_groups", 16),
)
DEFAULTS = {key: default for key, (_, default) in FIELDS.items()}
DEFAULTS |= dict(conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2))
DEFAULTS |= dict(conv_dim=(512,) * 7)
# settings that no MERT has otherwise
FIXED = dict(feat_extract_norm="group", feat_extract_activation="gelu", feat_proj_layer_norm=True)
FIXED |= dict(hidden_act="gelu", conv_bias=False, layer_norm_eps=1e-5)
FIXED |= dict(deepnorm=False, conv_pos_batch_norm=False)
DROPOUTS = "hidden_dropout attention_dropout activation_dropout feat_proj_dropout layerdrop".split()


def student(config: Mapping[str, Any]) -> Student:
    """Return the student of a `config.json`, whose dropouts are HuBERT's leftovers and not read."""
    if wrong := [f"{k}={config[k]!r}, not {x}" for k, x in FIXED.items() if config.get(k, x) != x]:
        raise UserError(f"not a MERT this program knows: {'; '.join(wrong)}")
    config = DEFAULTS | dict(config)
    try:
        return Student(
            conv_dim=config["conv_dim"][0],
            conv_kernels=tuple(config["conv_kernel"]),
            conv_strides=tuple(config["conv_stride"]),
            project_equal_widths=True,
            **{field: config[key] for key, (field, _) in FIELDS.items()},
        )
    except (TypeError, IndexError) as e:  # a number in place of a list, or nothing in it
        raise UserError(f"config.json does not describe a student: {e}") from e


def config(student: Student, about: About) -> dict[str, Any]:
    """Return the `config.json` of `student`, for transformers 4.38 and later and for MARBLE."""
    layers, training = len(student.conv_kernels), about.config.get("model", {})
    return FIXED | dict(
        architectures=["HubertModel"],
        model_type="hubert",
        conv_dim=[student.conv_dim] * layers,
        conv_kernel=list(student.conv_kernels),
        conv_stride=list(student.conv_strides),
        num_feat_extract_layers=layers,
        **{key: getattr(student, field) for key, (field, _) in FIELDS.items()},
        **{key: training.get(key.replace("feat_proj", "input"), 0.0) for key in DROPOUTS},
        # above 0 the model has its mask embedding; without apply_spec_augment nothing is masked
        mask_time_prob=0.05,
        apply_spec_augment=False,
        feature_extractor_cqt=False,  # MERT's own code requires it
        sample_rate=about.sample_rate,
        dtype=about.dtype,
        torch_dtype=about.dtype,  # its name before transformers 5
    )


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """Read a directory, which has no heads and no `moments`."""
    folder = Path(path)
    model = student(state_dict.read_json(folder / "config.json"))
    state = state_dict.read_tensor_folder(folder)
    preprocessor = folder / "preprocessor_config.json"
    settings = state_dict.read_json(preprocessor) if preprocessor.exists() else {}
    about = About(
        sample_rate=settings.get("sampling_rate", SAMPLE_RATE),
        do_normalize=settings.get("do_normalize", False),
        dtype=tensor_names.dtype_of(state),
        licence=model_card.licence(folder),
        lineage=(f"{folder.absolute().name} (Hugging Face)",),
    )
    return Checkpoint(model, tensor_names.params_from_hf(state, model, path), None, 0, about)


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Fill the directory `path` with files that `HubertModel.from_pretrained` loads."""
    about, folder = checkpoint.about, Path(path)
    state = tensor_names.params_to_hf(checkpoint.params)
    state = {name: np.asarray(x, tensor_names.DTYPES[about.dtype]) for name, x in state.items()}
    state_dict.write_tensors(folder / state_dict.NAMES[0], state, {"format": "pt"})
    preprocessor = dict(feature_extractor_type="Wav2Vec2FeatureExtractor", feature_size=1)
    preprocessor |= dict(sampling_rate=about.sample_rate, do_normalize=about.do_normalize)
    preprocessor |= dict(padding_side="right", padding_value=0.0, return_attention_mask=True)
    files = {"config": config(checkpoint.student, about), "preprocessor_config": preprocessor}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "README.md").write_text(model_card.text(checkpoint), encoding="utf-8")

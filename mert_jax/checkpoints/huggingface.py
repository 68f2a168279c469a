"""Hugging Face directories: MERT's own, and ones that the stock `HubertModel` loads.

A directory has `config.json`, the weights (safetensors, or torch's .bin) and
`preprocessor_config.json`; written ones have a model card too.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mert_jax.checkpoints import model_card, tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint, common_width
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.tensors import state_dict

# transformers' defaults (huggingface/transformers, `configuration_hubert.py`): a config.json need
# not repeat them
DEFAULTS = dict(
    conv_dim=(512,) * 7,
    conv_kernel=(10, 3, 3, 3, 3, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2),
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    do_stable_layer_norm=False,
    num_conv_pos_embeddings=128,
    num_conv_pos_embedding_groups=16,
)
# what no MERT has otherwise and this student lacks
ONLY = dict(
    feat_extract_norm="group",
    feat_extract_activation="gelu",
    feat_proj_layer_norm=True,
    hidden_act="gelu",
    conv_bias=False,
    layer_norm_eps=1e-5,
    deepnorm=False,
    conv_pos_batch_norm=False,
)


def student(config: Mapping[str, Any]) -> Student:
    """The student of a Hugging Face MERT's `config.json`, without dropout and without heads.

    Dropouts, SpecAugment and CTC fields are leftovers of HuBERT's that do not describe MERT's
    training and are not read. Raises UserError for settings that no MERT has.
    """
    if wrong := [
        f"{key}={config[key]!r}" for key in ONLY if config.get(key, ONLY[key]) != ONLY[key]
    ]:
        raise UserError(f"not a MERT this program knows: {', '.join(wrong)}")
    config = DEFAULTS | dict(config)
    try:
        return Student(
            conv_dim=common_width(config["conv_dim"]),
            conv_kernels=tuple(config["conv_kernel"]),
            conv_strides=tuple(config["conv_stride"]),
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            pre_norm=config["do_stable_layer_norm"],
            project_equal_widths=True,
            pos_conv_kernel=config["num_conv_pos_embeddings"],
            pos_conv_groups=config["num_conv_pos_embedding_groups"],
        )
    except TypeError as e:  # a number in place of a list
        raise UserError(f"config.json does not describe a student: {e}") from e


def config(student: Student, about: About) -> dict[str, Any]:
    """The `config.json` of `student`, for every transformers since 4.38 and for MARBLE."""
    layers = len(student.conv_kernels)
    training = about.config.get("model", {})
    return ONLY | dict(
        architectures=["HubertModel"],
        model_type="hubert",
        conv_dim=[student.conv_dim] * layers,
        conv_kernel=list(student.conv_kernels),
        conv_stride=list(student.conv_strides),
        num_feat_extract_layers=layers,
        hidden_size=student.hidden_size,
        num_hidden_layers=student.num_layers,
        num_attention_heads=student.num_heads,
        intermediate_size=student.intermediate_size,
        do_stable_layer_norm=student.pre_norm,
        num_conv_pos_embeddings=student.pos_conv_kernel,
        num_conv_pos_embedding_groups=student.pos_conv_groups,
        hidden_dropout=training.get("hidden_dropout", 0.0),
        attention_dropout=training.get("attention_dropout", 0.0),
        activation_dropout=training.get("activation_dropout", 0.0),
        feat_proj_dropout=training.get("input_dropout", 0.0),
        layerdrop=training.get("layerdrop", 0.0),
        # above 0 the model has its mask embedding; without apply_spec_augment nothing is masked
        mask_time_prob=0.05,
        apply_spec_augment=False,
        feature_extractor_cqt=False,  # what MERT's own code asks for
        sample_rate=about.sample_rate,
        dtype=about.dtype,
        torch_dtype=about.dtype,  # its name before transformers 5
    )


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """The checkpoint in a directory; it has no heads, moments or step.

    Raises UserError as `formats.read` does.
    """
    del moments
    found = student(state_dict.read_json(os.path.join(path, "config.json")))
    state = state_dict.read_tensor_folder(path)
    preprocessor = os.path.join(path, "preprocessor_config.json")
    settings = state_dict.read_json(preprocessor) if os.path.exists(preprocessor) else {}
    about = About(
        sample_rate=settings.get("sampling_rate", 24_000),
        do_normalize=settings.get("do_normalize", False),
        dtype=tensor_names.dtype_of(state),
        licence=model_card.licence(path),
        lineage=(f"{os.path.basename(os.path.abspath(path))} (Hugging Face)",),
    )
    return Checkpoint(found, tensor_names.params_from_hf(state, found, path), None, 0, about)


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Fill the directory `path` with what `transformers.HubertModel.from_pretrained` loads.

    Raises OSError where the disk does not take it.
    """
    about = checkpoint.about
    state = tensor_names.params_to_hf(checkpoint.params)
    state = {name: np.asarray(x, tensor_names.DTYPES[about.dtype]) for name, x in state.items()}
    state_dict.write_tensors(os.path.join(path, state_dict.NAMES[0]), state, {"format": "pt"})
    preprocessor = dict(
        feature_extractor_type="Wav2Vec2FeatureExtractor",
        feature_size=1,
        sampling_rate=about.sample_rate,
        do_normalize=about.do_normalize,
        padding_side="right",
        padding_value=0.0,
        return_attention_mask=True,
    )
    files = {
        "config.json": json.dumps(config(checkpoint.student, about), indent=1) + "\n",
        "preprocessor_config.json": json.dumps(preprocessor, indent=1) + "\n",
        "README.md": model_card.text(checkpoint),
    }
    for name, content in files.items():
        with open(os.path.join(path, name), "w", encoding="utf-8") as f:
            f.write(content)

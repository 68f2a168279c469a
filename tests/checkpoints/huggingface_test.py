"""Hugging Face directories: every file and spelling, writing, refusals, and the model card."""

import json

import ml_dtypes
import numpy as np
import pytest

from mert_jax.checkpoints import huggingface, in_memory, model_card, tensor_names
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.tensors import state_dict, torch_pickle
from tests import checkpoint_samples
from tests.checkpoint_samples import FLAVOURS, GOLDEN, assert_same, hf_folder, hf_state, hf_student


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request):
    return hf_student(**FLAVOURS[request.param])


@pytest.fixture
def folder(tmp_path):
    """A directory of the 95M flavour, in float32."""
    return hf_folder(tmp_path / "model", hf_student(), hf_state(hf_student()))


def edit(folder, file, **changes):
    """Change settings in a JSON file; None removes one."""
    path = f"{folder}/{file}"
    with open(path) as f:
        content = json.load(f) | changes
    with open(path, "w") as f:
        json.dump({key: x for key, x in content.items() if x is not None}, f)


# reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", state_dict.NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_directory_with_the_official_leftovers(flavour, tmp_path, file, dtype, spelling):
    state = hf_state(flavour, tensor_names.DTYPES[dtype])
    path = hf_folder(tmp_path / "m", flavour, checkpoint_samples.respelt(state, spelling), file)
    checkpoint = read_checkpoint(path)
    assert checkpoint.student == flavour
    assert (checkpoint.moments, checkpoint.step) == (None, 0)
    about = checkpoint.about
    assert (about.sample_rate, about.do_normalize, about.dtype) == (24_000, False, dtype)
    assert about.lineage == ("m (Hugging Face)",)
    assert_same(checkpoint.params, tensor_names.params_from_hf(state, flavour))


@pytest.mark.parametrize("size", ["base", "large"])
def test_leftovers_of_the_official_configs_are_not_read(size):
    config = json.loads((GOLDEN / f"hf_{size}_config.json").read_text())
    student = huggingface.student(config)
    for dropout in ("hidden", "attention", "activation"):
        assert getattr(student, f"{dropout}_dropout") == 0
    assert student.layerdrop == 0
    assert student.pre_norm == (size == "large")
    assert student.num_layers == config["num_hidden_layers"]
    odd = dict(ctc_loss_reduction="?", mask_feature_min_masks="many", tokenizer_class=[], x=None)
    assert huggingface.student(config | odd) == student


def test_settings_that_are_left_out_have_transformers_defaults():
    student = huggingface.student({})
    sizes = (student.hidden_size, student.num_layers, student.num_heads, student.pre_norm)
    assert sizes == (768, 12, 12, False)
    assert student.conv_kernels == (10, 3, 3, 3, 3, 2, 2)


@pytest.mark.parametrize(
    ("settings", "rate", "normalize"),
    [
        (None, 24_000, False),
        ({}, 24_000, False),
        ({"sampling_rate": 16_000, "do_normalize": True}, 16_000, True),
        ({"do_normalize": False, "feature_size": 1}, 24_000, False),
    ],
)
def test_the_preprocessors_settings(folder, settings, rate, normalize):
    if settings is not None:
        with open(f"{folder}/preprocessor_config.json", "w") as f:
            json.dump(settings, f)
    about = read_checkpoint(folder).about
    assert (about.sample_rate, about.do_normalize) == (rate, normalize)


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: cc-by-nc-4.0\ntags:\n- music\n---\n# MERT", "cc-by-nc-4.0"),
        ("---\ntags: [a]\nlicense:   mit\n---", "mit"),
        ("---\nlicense: unknown\n---\n", ""),
        ("---\ntags: [a]\n---\nlicense: mit\n", ""),
        ("# MERT\nlicense: mit\n", ""),
        ("---\nlicense: mit", ""),
        ("---\nlicense:\ntags: [a]\n---\n", ""),
        ("", ""),
    ],
)
def test_the_licence_of_a_model_card(tmp_path, readme, licence):
    (tmp_path / "README.md").write_text(readme)
    assert model_card.licence(tmp_path) == licence


def test_without_a_model_card_there_is_no_licence(tmp_path):
    assert model_card.licence(tmp_path) == ""


# writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_there_and_back_gives_the_same_bytes(flavour, tmp_path, dtype, spelling):
    state = hf_state(flavour, dtype)
    checkpoint = read_checkpoint(
        hf_folder(tmp_path / "m", flavour, checkpoint_samples.respelt(state, spelling))
    )
    (tmp_path / "back").mkdir()
    huggingface.write_checkpoint(str(tmp_path / "back"), checkpoint)
    back = state_dict.read_tensor_folder(tmp_path / "back")
    checkpoint_samples.same_state({name: back[name] for name in state}, state)
    assert back.keys() == state.keys()
    again = read_checkpoint(tmp_path / "back")
    assert again.student == flavour
    assert again.about._replace(lineage=()) == checkpoint.about._replace(lineage=())
    assert_same(again.params, checkpoint.params)


def test_written_settings(flavour, tmp_path):
    about = in_memory.About(
        sample_rate=16_000,
        do_normalize=True,
        dtype="bfloat16",
        config={"model": {"hidden_dropout": 0.1, "layerdrop": 0.05, "input_dropout": 0.2}},
    )
    params = checkpoint_samples.params_of(flavour)
    huggingface.write_checkpoint(
        str(tmp_path), in_memory.Checkpoint(flavour, params, None, 0, about)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "hubert"
    assert config["architectures"] == ["HubertModel"]
    assert config["do_stable_layer_norm"] == flavour.pre_norm
    assert (config["hidden_dropout"], config["layerdrop"]) == (0.1, 0.05)
    assert config["feat_proj_dropout"] == 0.2
    assert config["apply_spec_augment"] is False
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessor["sampling_rate"] == 16_000
    assert preprocessor["do_normalize"] is True
    assert huggingface.student(config) == flavour


def test_heads_are_left_out_and_equal_widths_get_the_identity(tmp_path):
    student = checkpoint_samples.student(conv_dim=16)
    params = checkpoint_samples.params_of(student)
    checkpoint = in_memory.Checkpoint(student, params, None, 9, in_memory.About())
    huggingface.write_checkpoint(str(tmp_path), checkpoint)
    state = state_dict.read_tensor_folder(tmp_path)
    eye = np.eye(16, dtype=np.float32)
    np.testing.assert_array_equal(state["feature_projection.projection.weight"], eye)
    assert not state["feature_projection.projection.bias"].any()
    assert state.keys() == hf_state(hf_student(conv_dim=16)).keys()
    assert read_checkpoint(tmp_path).student == hf_student(conv_dim=16)


# damaged or foreign directories ------------------------------------------------------------------


def test_every_wrong_tensor_is_listed(folder):
    state = hf_state(hf_student())
    del state["encoder.layers.1.attention.q_proj.bias"]
    state["masked_spec_embed"][:] = np.inf
    state["feature_projection.layer_norm.weight"] = np.zeros(5, np.float32)
    state["lm_head.weight"] = np.zeros((3, 3), np.float32)
    state_dict.write_tensors(f"{folder}/model.safetensors", state)
    with pytest.raises(UserError) as raised:
        read_checkpoint(folder)
    for words in (
        f"{folder}: 4 tensors are wrong",
        "missing encoder.layers.1.attention.q_proj.bias",
        "masked_spec_embed has 16 values that are not finite",
        "feature_projection.layer_norm.weight is [5], not [8]",
        "unexpected lm_head.weight",
    ):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"missing encoder\.layers\.2\.attention\.q_proj\.weight"),
        ({"num_hidden_layers": 1}, r"unexpected encoder\.layers\.1\."),
        ({"hidden_size": 32}, r"masked_spec_embed is \[16\], not \[32\]"),
        ({"conv_dim": []}, "config.json does not describe a student"),
        ({"num_attention_heads": 5}, "'num_heads': 5"),
        ({"num_attention_heads": "four"}, "'num_heads': 'four'"),
        ({"num_attention_heads": 0}, "'num_heads': 0"),
        ({"num_attention_heads": [4]}, r"'num_heads': \[4\]"),
        ({"conv_stride": [5, 2]}, "no student can have"),
        ({"conv_dim": 8}, "config.json does not describe a student"),
        ({"feat_extract_norm": "layer"}, "feat_extract_norm='layer'"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm=True"),
        (
            {"deepnorm": True, "hidden_act": "relu"},
            "hidden_act='relu', not gelu; deepnorm",
        ),
    ],
)
def test_settings_that_contradict_the_tensors(folder, change, message):
    edit(folder, "config.json", **change)
    with pytest.raises(UserError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff\xfe", '"mert"'])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_garbled_settings(folder, file, content):
    with open(f"{folder}/{file}", "wb") as f:
        f.write(content.encode("latin1"))
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        read_checkpoint(folder)


@pytest.mark.parametrize("file", state_dict.NAMES)
def test_weights_cut_short(tmp_path, file):
    path = hf_folder(tmp_path / "m", hf_student(), hf_state(hf_student()), file)
    content = (tmp_path / "m" / file).read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "m" / file).write_bytes(content[:length])
        with pytest.raises(UserError, match=f"{file} is not a readable"):
            read_checkpoint(path)


def test_a_trainers_state_in_place_of_weights(tmp_path):
    path = hf_folder(tmp_path / "m", hf_student(), {}, "pytorch_model.bin")
    torch_pickle.write_pickle(f"{path}/pytorch_model.bin", {"model": {}, "epoch": 1})
    with pytest.raises(UserError, match=r"not a state dict: 2 of its 2 entries.*model, epoch"):
        read_checkpoint(path)


def test_integers_in_place_of_weights(folder):
    state = hf_state(hf_student())
    state["masked_spec_embed"] = np.arange(16)
    state_dict.write_tensors(f"{folder}/model.safetensors", state)
    assert read_checkpoint(folder).about.dtype == "float32"


# the model card ----------------------------------------------------------------------------------


def test_model_card(tmp_path):
    student = checkpoint_samples.student(pre_norm=True)
    about = in_memory.About(
        do_normalize=True,
        licence="cc-by-nc-4.0",
        config={"total_steps": 400_000, "optimizer": {"peak_learning_rate": 5e-4}, "data": {}},
        metrics={"step": 5, "loss": 4.123456, "masked_accuracy": [0.123456, None]},
        data=({"name": "folk", "tracks": 12, "hours": 1.5}, {"name": "jazz", "tracks": 3}),
        lineage=("MERT-v1-95M (Hugging Face)", "run (step 5)"),
    )
    params = checkpoint_samples.params_of(student)
    huggingface.write_checkpoint(
        str(tmp_path), in_memory.Checkpoint(student, params, None, 12_345, about)
    )
    text = (tmp_path / "README.md").read_text()
    for words in (
        "---\nlicense: cc-by-nc-4.0\nlibrary_name: transformers\n",
        "2 pre-norm layers of 16, 24000 Hz mono in, 1200 frames a second",
        "HubertModel.from_pretrained",
        "4.x returns it after the final layer norm",
        "normalised to mean 0 and variance 1: the processor's `do_normalize` is true",
        "Goes back to MERT-v1-95M (Hugging Face); run (step 5).",
        "12,345 updates.",
        "total_steps: 400000\noptimizer.peak_learning_rate: 0.0005",
        "| name | tracks | hours |\n| --- | --- | --- |\n| folk | 12 | 1.5 |\n| jazz | 3 |  |",
        "| loss | 4.123456 |",
        "| masked_accuracy | [0.1235, None] |",
    ):
        assert words in text
    assert model_card.licence(tmp_path) == "cc-by-nc-4.0"


def test_model_card_of_an_unknown_checkpoint():
    student = hf_student()
    text = model_card.text(in_memory.Checkpoint(student, {}, None, 0, in_memory.About()))
    for words in (
        "license: unknown",
        "Whoever publishes this model must set it",
        "The number of updates is unknown.",
        "The recipe is unknown",
        "Unknown: the checkpoint does not say.",
        "None were kept with the checkpoint.",
        "waves as they are: the processor's `do_normalize` is false",
        "`hidden_states[l]` the output of layer l.",
    ):
        assert words in text
    assert "transformers: 4.x" not in text


def test_no_head_takes_a_name_that_transformers_knows():
    student = hf_student().clone(heads=(mert_v1.Head("cqt", 14),))
    state = tensor_names.params_to_hf(checkpoint_samples.params_of(student))
    assert state.keys() == hf_state(hf_student()).keys()

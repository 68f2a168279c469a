"""Files of the official trainer: reading, refusals, and writing them back bit for bit."""

import re

import numpy as np
import pytest

from mert_jax.checkpoints import fairseq, in_memory, tensor_names
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Head
from mert_jax.tensors import torch_pickle
from tests import checkpoint_samples
from tests.checkpoint_samples import (
    CONVS,
    FLAVOURS,
    Object,
    assert_same,
    dictionary,
    params_of,
    student,
)

BOOKS, CODES = 2, 64


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request):
    return student(**FLAVOURS[request.param])


@pytest.fixture(scope="module")
def base():
    """A student and the tensors of its file."""
    return student(), checkpoint_samples.official_state(student())


def write(path, student, state, **changes) -> str:
    checkpoint_samples.write_with_objects(
        path, checkpoint_samples.content(student, state, **changes)
    )
    return str(path)


def test_a_file_after_fp16_training(flavour, tmp_path):
    state = checkpoint_samples.official_state(flavour, np.float16)
    last = checkpoint_samples.moments(state, flat=True)
    checkpoint = read_checkpoint(
        write(tmp_path / "x.pt", flavour, state, last_optimizer_state=last)
    )
    assert checkpoint.student == flavour
    assert checkpoint.step == 7
    about = checkpoint.about
    assert (about.sample_rate, about.do_normalize, about.dtype) == (24_000, False, "float16")
    assert about.flat_moments
    assert about.lineage == ("x.pt (fairseq)",)
    assert_same(checkpoint.params, tensor_names.params_from_fairseq(state, flavour))
    order = [name for name in state if "spec_layer" not in name]
    for moment, key in zip(checkpoint.moments, ("exp_avg", "exp_avg_sq"), strict=True):
        again = tensor_names.params_to_fairseq(moment)
        assert list(again) == order
        flat = np.concatenate([x.reshape(-1) for x in again.values()])
        np.testing.assert_array_equal(flat, last["state"][0][key])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("moments", ["flat", "each", None])
def test_there_and_back_gives_the_same_bytes(flavour, tmp_path, dtype, moments):
    state = checkpoint_samples.official_state(flavour, tensor_names.DTYPES[dtype])
    last = moments and checkpoint_samples.moments(state, moments == "flat")
    first = read_checkpoint(write(tmp_path / "x.pt", flavour, state, last_optimizer_state=last))
    fairseq.write_checkpoint(tmp_path / "back.pt", first)
    content = torch_pickle.read_pickle(tmp_path / "back.pt")
    checkpoint_samples.same_state(content["model"], state)
    assert content["optimizer_history"][-1]["num_updates"] == 7
    again = content["last_optimizer_state"]
    if last is None:
        assert again is None
        assert first.moments is None
        return
    assert again["state"].keys() == last["state"].keys()
    for i, entry in last["state"].items():
        assert again["state"][i]["step"] == 7
        checkpoint_samples.same_state(
            {key: again["state"][i][key] for key in ("exp_avg", "exp_avg_sq")},
            {key: entry[key] for key in ("exp_avg", "exp_avg_sq")},
        )
    assert again["param_groups"][0]["params"] == list(last["state"])


def test_written_settings_describe_the_student(flavour, tmp_path):
    state = checkpoint_samples.official_state(flavour)
    first = read_checkpoint(write(tmp_path / "x.pt", flavour, state))
    first = first._replace(about=first.about._replace(do_normalize=True, sample_rate=16_000))
    fairseq.write_checkpoint(tmp_path / "back.pt", first)
    again = read_checkpoint(tmp_path / "back.pt")
    assert again.student == flavour
    assert (again.about.do_normalize, again.about.sample_rate) == (True, 16_000)
    written = torch_pickle.read_pickle(tmp_path / "back.pt")["cfg"]["model"]
    expected = checkpoint_samples.settings(flavour)["model"]
    same = expected.keys() & written.keys() - {"conv_feature_layers"}
    assert len(same) > 10
    assert {key: written[key] for key in same} == {key: expected[key] for key in same}
    layers = [fairseq.conv_layers(x["conv_feature_layers"]) for x in (written, expected)]
    assert layers[0] == layers[1]


def node(value) -> Object:
    """Return a setting as OmegaConf stores it."""
    if isinstance(value, dict):
        inside = {key: node(x) for key, x in value.items()}
        return Object("omegaconf.dictconfig", "DictConfig", {"_content": inside, "_parent": None})
    if isinstance(value, list | tuple):
        inside = [node(x) for x in value]
        return Object("omegaconf.listconfig", "ListConfig", {"_content": inside, "_parent": None})
    return Object("omegaconf.nodes", "AnyNode", {"_val": value, "_parent": None})


@pytest.mark.parametrize("kind", ["omegaconf", "namespace", "both"])
def test_other_spellings_of_the_settings(flavour, tmp_path, kind):
    settings = checkpoint_samples.settings(flavour)
    state = checkpoint_samples.official_state(flavour)
    old = {**settings["common"], **settings["task"], **settings["model"], "normalize": True}
    namespace = Object("argparse", "Namespace", old)
    changes = {
        "omegaconf": {"cfg": node(settings | {"task": settings["task"] | {"normalize": True}})},
        "namespace": {"cfg": None, "args": namespace},
        "both": {"cfg": {}, "args": namespace},
    }[kind]
    checkpoint = read_checkpoint(write(tmp_path / "x.pt", flavour, state, **changes))
    assert checkpoint.student == flavour
    assert checkpoint.about.do_normalize
    assert_same(checkpoint.params, params_of(flavour))


def test_settings_that_are_left_out_have_fairseqs_defaults(base, tmp_path):
    expected = student(num_heads=1, hidden_size=24)
    state = checkpoint_samples.official_state(expected)
    cfg = {"model": {"conv_feature_layers": CONVS, "encoder_attention_heads": 1}}
    checkpoint = read_checkpoint(write(tmp_path / "x.pt", expected, state, cfg=cfg))
    assert checkpoint.student == expected
    assert (checkpoint.about.sample_rate, checkpoint.about.do_normalize) == (24_000, False)


def test_heads_that_a_file_lacks(base, tmp_path):
    model, state = base
    for parts, heads in (
        (("encoder_cqt_model",), model.heads[:1]),
        (("label_embs_concat", "final_proj"), model.heads[1:]),
        (("label_embs_concat", "final_proj", "encoder_cqt_model"), ()),
    ):
        rest = {name: x for name, x in state.items() if not name.startswith(parts)}
        checkpoint = read_checkpoint(write(tmp_path / "x.pt", model, rest))
        assert checkpoint.student.heads == heads
        with pytest.raises(UserError, match=r"one head for codes and one for the CQT"):
            fairseq.write_checkpoint(tmp_path / "back.pt", checkpoint)


# codebooks whose rows are in another order -------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_rows_follow_the_dictionaries_and_go_back(base, tmp_path, flat):
    model, state = base
    rng = np.random.default_rng(3)
    listed = [rng.permutation(CODES), np.arange(CODES)]
    last = checkpoint_samples.moments(state, flat)
    changes = dict(
        task_state={"dictionaries": [dictionary(codes) for codes in listed]},
        last_optimizer_state=last,
    )
    checkpoint = read_checkpoint(write(tmp_path / "x.pt", model, state, **changes))
    plain = read_checkpoint(write(tmp_path / "plain.pt", model, state, last_optimizer_state=last))
    pairs = zip(
        (checkpoint.params, *checkpoint.moments), (plain.params, *plain.moments), strict=True
    )
    for read, file in pairs:
        books, rows = read["rvq_vae_codebooks"], file["rvq_vae_codebooks"]
        np.testing.assert_array_equal(books[:, :4], rows[:, :4])
        for row, code in enumerate(listed[0]):
            np.testing.assert_array_equal(books[0, 4 + code], rows[0, 4 + row])
        np.testing.assert_array_equal(books[1], rows[1])
        assert not np.array_equal(books[0], rows[0])
    fairseq.write_checkpoint(tmp_path / "back.pt", checkpoint)
    content = torch_pickle.read_pickle(tmp_path / "back.pt")
    checkpoint_samples.same_state(content["model"], state)
    assert_same(content["last_optimizer_state"]["state"], last["state"])
    again = read_checkpoint(tmp_path / "back.pt")
    assert again.about.row_orders == checkpoint.about.row_orders
    assert_same(again.params, checkpoint.params)
    assert_same(again.moments, checkpoint.moments)


def test_dictionaries_in_order_change_nothing(base, tmp_path):
    model, state = base
    changes = dict(task_state={"dictionaries": [dictionary(range(CODES))] * BOOKS})
    checkpoint = read_checkpoint(write(tmp_path / "x.pt", model, state, **changes))
    assert checkpoint.about.row_orders == ()
    assert_same(checkpoint.params, params_of(model))


def test_numpy_labels_are_row_numbers(base, tmp_path):
    """With `numpy_memmap_label` code c was trained on row c, and the last four rows are unused."""
    model, state = base
    settings = checkpoint_samples.settings(model)
    cfg = settings | {"task": settings["task"] | {"numpy_memmap_label": True}}
    checkpoint = read_checkpoint(write(tmp_path / "x.pt", model, state, cfg=cfg))
    books, rows = checkpoint.params["rvq_vae_codebooks"], params_of(model)["rvq_vae_codebooks"]
    np.testing.assert_array_equal(books[:, 4:], rows[:, :CODES])
    np.testing.assert_array_equal(books[:, :4], rows[:, CODES:])
    fairseq.write_checkpoint(tmp_path / "back.pt", checkpoint)
    checkpoint_samples.same_state(torch_pickle.read_pickle(tmp_path / "back.pt")["model"], state)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([range(CODES)], r"books \[0\] only, for 2 codebooks of 68 rows"),
        ([range(CODES), range(CODES - 1)], r"its dictionaries number the rows of books \[0\] only"),
        ([[0, *range(CODES - 1)], range(CODES)], r"books \[1\] only"),
        ([["a", *range(CODES - 1)], range(CODES)], r"books \[1\] only"),
        ([range(1, CODES + 1), range(CODES)], r"books \[1\] only"),
    ],
)
def test_dictionaries_that_do_not_fit(base, tmp_path, listed, message):
    state = {"dictionaries": [dictionary(codes) for codes in listed]}
    with pytest.raises(UserError, match=message):
        read_checkpoint(write(tmp_path / "x.pt", *base, task_state=state))


def test_orders_of_other_books_are_refused(base, tmp_path):
    for orders in ([[1, 0]], [list(range(68))], [[0] * 68] * BOOKS):
        extra = {"mert_jax_row_orders": orders}
        with pytest.raises(UserError, match=r"row_orders number .*for 2 codebooks of 68 rows"):
            read_checkpoint(write(tmp_path / "x.pt", *base, extra_state=extra))


# Adam's moments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_moments_of_other_parameters_are_refused(base, tmp_path, flat, key):
    last = checkpoint_samples.moments(base[1], flat)
    entry = last["state"][max(last["state"])]
    entry[key] = np.append(entry[key], np.float32(0))
    path = write(tmp_path / "x.pt", *base, last_optimizer_state=last)
    with pytest.raises(UserError, match=rf"optimiser's {key} has .*--moments=False"):
        read_checkpoint(path)
    assert read_checkpoint(path, moments=False).moments is None


def test_moments_of_another_optimizer_are_refused(base, tmp_path):
    last = {"state": {0: {"momentum_buffer": np.zeros(3, np.float32)}}}
    with pytest.raises(UserError, match=r"x\.pt: .*exp_avg has 0 values .*--moments=False"):
        read_checkpoint(write(tmp_path / "x.pt", *base, last_optimizer_state=last))


def test_a_nan_in_a_moment_is_reported(base, tmp_path):
    last = checkpoint_samples.moments(base[1], flat=True)
    last["state"][0]["exp_avg_sq"][0] = np.nan
    path = write(tmp_path / "x.pt", *base, last_optimizer_state=last)
    with pytest.raises(UserError, match=r"exp_avg_sq: .*mask_emb has 1 values"):
        read_checkpoint(path)
    read_checkpoint(path, moments=False)


@pytest.mark.parametrize("last", [None, {}, {"state": {}, "param_groups": []}])
def test_a_file_without_moments(base, tmp_path, last):
    changes = dict(last_optimizer_state=last, optimizer_history=[])
    checkpoint = read_checkpoint(write(tmp_path / "x.pt", *base, **changes))
    assert checkpoint.moments is None
    assert checkpoint.step == 0


# damaged or foreign files ------------------------------------------------------------------------


def test_every_wrong_tensor_is_listed(base, tmp_path):
    model, state = base
    wrong = {name: x for name, x in state.items() if name != "encoder.layers.1.fc2.bias"}
    wrong["surprise"] = np.zeros(1, np.float32)
    wrong["layer_norm.weight"] = np.zeros(5, np.float32)
    wrong["mask_emb"] = np.full(16, np.nan, np.float32)
    with pytest.raises(UserError) as raised:
        read_checkpoint(write(tmp_path / "x.pt", model, wrong))
    for words in (
        "x.pt: 4 tensors are wrong",
        "missing encoder.layers.1.fc2.bias",
        "unexpected surprise",
        "layer_norm.weight is [5], not [8]",
        "mask_emb has 16 values that are not finite",
    ):
        assert words in str(raised.value)


def test_any_missing_tensor_is_named(base, tmp_path):
    model, state = base
    for name in state:
        if "spec_layer" in name or ".layers.0." in name:
            continue
        rest = {key: x for key, x in state.items() if key != name}
        path = write(tmp_path / "x.pt", model, rest)
        with pytest.raises(UserError, match=rf"x\.pt.*missing {re.escape(name)}"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers": 3}, "encoder_layers=3, 2 in its tensors"),
        ({"encoder_embed_dim": 32}, "encoder_embed_dim=32, 16 in its tensors"),
        ({"encoder_ffn_embed_dim": 1}, "encoder_ffn_embed_dim=1, 24 in its tensors"),
        ({"conv_pos": 128}, "conv_pos=128, 8 in its tensors"),
        ({"conv_pos_groups": 4}, "conv_pos_groups=4, 2 in its tensors"),
        ({"encoder_attention_heads": 5}, "'hidden_size': 16, 'num_layers': 2, 'num_heads': 5"),
        ({"conv_feature_layers": "[(8,10,5)] * 3"}, r"conv_layers\.1.*is \[8, 8, 3\], not"),
        ({"conv_feature_layers": "[(8,10,5)]"}, "unexpected feature_extractor.conv_layers.1"),
        ({"conv_feature_layers": "open('x')"}, "not understood"),
        ({"conv_feature_layers": "[(8,"}, "not understood"),
        ({"conv_feature_layers": 3}, "not understood"),
        ({"conv_feature_layers": "[(8,10)] + [(8,3,2)] * 2"}, "not understood"),
        ({"conv_feature_layers": "[(8,10,5)] + 3"}, "not understood"),
        ({"deepnorm": True}, "deepnorm=True"),
        ({"extractor_mode": "layer_norm"}, "extractor_mode='layer_norm'"),
        ({"conv_bias": True}, "conv_bias=True"),
        ({"untie_final_proj": False}, "untie_final_proj=False"),
    ],
)
def test_settings_that_contradict_the_tensors(base, tmp_path, change, message):
    settings = checkpoint_samples.settings(base[0])
    cfg = settings | {"model": settings["model"] | change}
    with pytest.raises(UserError, match=message):
        read_checkpoint(write(tmp_path / "x.pt", *base, cfg=cfg))


def test_without_settings_the_student_cannot_be_known(base, tmp_path):
    with pytest.raises(UserError, match=r"x\.pt has neither cfg nor args"):
        read_checkpoint(write(tmp_path / "x.pt", *base, cfg=None))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"decoder.weight": np.zeros(2, np.float32)}},
            "not a checkpoint of .*holds: model",
        ),
        ({"epoch": 3, "state_dict": {}}, "not a checkpoint of .*holds: epoch, state_dict"),
        ({"model": "mert"}, "not a checkpoint of"),
        ([1, 2], "not a checkpoint of .*no dict"),
        ({"model": {"encoder.layers.0.fc1.weight": 3}, "cfg": {"model": {"a": 1}}}, r"x\.pt.*fc1"),
    ],
)
def test_torch_files_of_something_else(tmp_path, content, message):
    torch_pickle.write_pickle(tmp_path / "x.pt", content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "x.pt")


def test_a_file_cut_short(base, tmp_path):
    path = write(tmp_path / "x.pt", *base)
    content = (tmp_path / "x.pt").read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 30):
        (tmp_path / "x.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"x\.pt is not a readable torch file"):
            read_checkpoint(path)


# students that fairseq cannot store --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=()), "has: none"),
        (dict(heads=(Head("a", 68, 2), Head("b", 68, 1), Head("c", 14))), "has: a, b, c"),
        (dict(project_equal_widths=True, conv_dim=16), "does not project equal widths"),
    ],
)
def test_students_that_fairseq_cannot_store(tmp_path, options, message):
    model = student(**options)
    about = in_memory.About()
    with pytest.raises(UserError, match=message):
        fairseq.write_checkpoint(
            tmp_path / "x.pt", in_memory.Checkpoint(model, params_of(model), None, 0, about)
        )
    assert not (tmp_path / "x.pt").exists()


def test_heads_in_another_order_and_of_other_names(tmp_path):
    model = student(heads=(Head("cqt", 14), Head("kmeans", 68, 2)))
    params = params_of(model)
    first = in_memory.Checkpoint(model, params, (params, params), 5, in_memory.About())
    fairseq.write_checkpoint(tmp_path / "x.pt", first)
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.student.heads == checkpoint_samples.HEADS
    kmeans = params["kmeans_codebooks"]
    np.testing.assert_array_equal(checkpoint.params["rvq_vae_codebooks"], kmeans)
    np.testing.assert_array_equal(checkpoint.moments[1]["rvq_vae_codebooks"], kmeans)
    assert checkpoint.step == 5


def test_books_without_special_codes_get_rows_for_them(tmp_path):
    model = student(heads=(Head("rvq_vae", 64, 2), Head("cqt", 14)))
    params, about = params_of(model), in_memory.About(special_codes=0)
    fairseq.write_checkpoint(
        tmp_path / "x.pt", in_memory.Checkpoint(model, params, (params, params), 5, about)
    )
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert checkpoint.student.heads == checkpoint_samples.HEADS
    for tree in (checkpoint.params, *checkpoint.moments):
        books = tree["rvq_vae_codebooks"]
        np.testing.assert_array_equal(books[:, 4:], params["rvq_vae_codebooks"])
        assert not books[:, :4].any()


# settings as text --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["__import__('os')", "[(1,2,3)] + x", "[(1,2,3)] ** 2"])
def test_conv_layers_are_parsed_not_run(text):
    with pytest.raises(UserError, match="not understood"):
        fairseq.conv_layers(text)


def test_conv_layers():
    parsed = fairseq.conv_layers(fairseq.DEFAULT_CONV)
    assert parsed == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2

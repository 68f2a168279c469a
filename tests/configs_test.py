"""The recipes: every size is consistent and has the heads of its teachers."""

import importlib

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from mert_jax.models import encodec as codec
from mert_jax.pretraining import build
from mert_jax.teachers import encodec_checkpoint, fitted_file, kmeans, mel_rvq

SIZES = ("base", "large", "tiny")
# name, classes and codebooks (0: regression) of each head; only MERT has fairseq's 4 extra classes
CQT = ("cqt", 336, 0)
HEADS = {
    "mert_v1": [("rvq_vae", 1028, 8), CQT],
    "continue_base": [("rvq_vae", 1028, 8), CQT],
    "mert_v0": [("kmeans", 304, 2), CQT],
    "musicfm": [("random_projection", 4096, 1)],
    "muq": [("mel_rvq", 1024, 8)],
}


def load(name: str):
    return importlib.import_module(f"configs.{name}").get_config


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Files of the default sizes of the commands, except that the codec has two filters."""
    paths = {name: str(tmp_path_factory.mktemp(name)) for name in ("rvq_vae", "kmeans", "mel_rvq")}
    for module in (kmeans, mel_rvq):
        tensors = {key: normal(*shape) for key, shape in module.shapes(module.SETTINGS).items()}
        fitted_file.write_fitted(paths[module.NAME], module.NAME, tensors, module.SETTINGS)
    networks = {
        "encoder": (codec.Encoder(2, 8), np.zeros((1, 640), np.float32)),
        "decoder": (codec.Decoder(2), np.zeros((1, 8, 8), np.float32)),
    }
    params = {"codebooks": normal(8, 1024, 8)}
    for part, (network, x) in networks.items():
        shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
        params[part] = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    encodec_checkpoint.write_encodec(paths["rvq_vae"], params)
    return paths


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", HEADS)
def test_every_size_has_the_heads_of_its_teachers(name, size, checkpoints):
    config = build.check(load(name)(size))
    for teacher in set(config.teachers) & set(checkpoints):
        config.teacher[teacher].checkpoint = checkpoints[teacher]
    made = build.make_teachers(config)
    student = build.make_student(config, made)
    expected = HEADS[name]
    if (name, size) == ("musicfm", "tiny"):
        expected = [("random_projection", 256, 1)]
    assert [tuple(head) for head in student.heads] == expected
    assert student.hidden_size == {"base": 768, "large": 1024, "tiny": 128}[size]


@pytest.mark.parametrize("name", HEADS)
def test_the_size_follows_a_colon(name):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["train", f"--config=configs/{name}.py:tiny"])
    assert holder.value.to_dict() == load(name)("tiny").to_dict()
    assert load(name)().to_dict() == load(name)("base").to_dict()


@pytest.mark.parametrize("name", HEADS)
def test_an_unknown_size_is_refused(name):
    with pytest.raises(ValueError, match="base, large or tiny, not 'huge'"):
        load(name)("huge")

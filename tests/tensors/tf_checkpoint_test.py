"""TensorFlow checkpoints: files of TensorFlow, other layouts, and damaged files."""

import random
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mert_jax.errors import UserError
from mert_jax.tensors import tf_checkpoint
from tests import tf_checkpoints

# written by SaveV2 of TensorFlow 2.21: `all` has x of every dtype, `text` strings, `sliced` half of
# a tensor
FILES = Path(__file__).parents[1] / "tf_files"
X = np.arange(12).reshape(3, 4)
NUMBERS = {
    "float": np.float32,
    "double": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "half": np.float16,
    **{f"{u}int{bits}": np.dtype(f"{u}int{bits}") for u in ("u", "") for bits in (8, 16, 32, 64)},
}


def test_files_of_tensorflow():
    tensors_read = tf_checkpoint.read_tf_checkpoint(FILES, "all")
    assert len(tensors_read) == len(NUMBERS) + 3 + 20
    for name, dtype in NUMBERS.items():
        assert tensors_read[f"numbers/{name}"].dtype == dtype
        np.testing.assert_array_equal(tensors_read[f"numbers/{name}"], X.astype(dtype))
    assert tensors_read["bool"].tolist() == [True, False]
    assert tensors_read["scalar"].shape == ()
    assert tensors_read["scalar"] == 2.5
    assert tensors_read["empty"].shape == (0, 3)
    for i in range(20):
        assert tensors_read[f"many/with_a_long_name_in_common_{i}"].tolist() == [i] * i


def test_several_blocks_in_a_folder_and_in_an_archive(tmp_path):
    tensors = {f"layer_{i}/kernel": np.full((i, 2), i, np.float32) for i in range(23)}
    tf_checkpoints.write(tmp_path / "inner", tensors)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in (tmp_path / "inner").iterdir():
            archive.write(file, f"inner/{file.name}")
    for folder in (tmp_path / "inner", zipfile.Path(tmp_path / "x.zip") / "inner"):
        tensors_read = tf_checkpoint.read_tf_checkpoint(folder)
        assert sorted(tensors_read) == sorted(tensors)
        for name, x in tensors.items():
            np.testing.assert_array_equal(tensors_read[name], x)
    with pytest.raises(UserError, match="has no TensorFlow checkpoint"):
        tf_checkpoint.read_tf_checkpoint(zipfile.Path(tmp_path / "x.zip") / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(block_type=1), "it is compressed"),
        (dict(header=b"\x08\x02"), "in 2 shards"),
        (dict(header=b"\x08\x01\x10\x01"), "big-endian"),
    ],
)
def test_unsupported_layouts_are_refused(tmp_path, options, message):
    tf_checkpoints.write(tmp_path, {"x": X.astype(np.float32)}, **options)
    with pytest.raises(UserError, match=message):
        tf_checkpoint.read_tf_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("text", "words is of dtype 7, not of numbers"),
        ("sliced", r"x is .* in 0 bytes"),
        ("none", "has no TensorFlow checkpoint"),
    ],
)
def test_unsupported_tensors_are_refused(prefix, message):
    with pytest.raises(UserError, match=message):
        tf_checkpoint.read_tf_checkpoint(FILES, prefix)


def test_files_cut_short_or_garbled(tmp_path):
    """Any bytes give tensors or a UserError; checksums are not verified."""
    index, data = (FILES / f"all{end}" for end in (".index", tf_checkpoint.DATA))
    index, data = index.read_bytes(), data.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        garbled = bytearray(index)
        garbled[rng.randrange(len(index))] = rng.randrange(256)
        (tmp_path / ".index").write_bytes(garbled)
        (tmp_path / tf_checkpoint.DATA).write_bytes(data)
        try:
            tf_checkpoint.read_tf_checkpoint(tmp_path)
        except UserError:
            refused += 1
    assert refused > 100
    for cut_index, cut_data, message in (
        (index[:-1], data, "it does not end as one"),
        (index[1:], data, "is not a readable TensorFlow index"),
        (b"", data, "it does not end as one"),
        (index, data[:-1], "buffer is smaller than requested size"),
    ):
        (tmp_path / ".index").write_bytes(cut_index)
        (tmp_path / tf_checkpoint.DATA).write_bytes(cut_data)
        with pytest.raises(UserError, match=message):
            tf_checkpoint.read_tf_checkpoint(tmp_path)

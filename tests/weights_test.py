"""Files of tensors: what safetensors and torch write, what is broken, and what would run code."""

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mert_jax import cli, weights

# written by torch 2.13, torch.save(state, path, _use_new_zipfile_serialization=True and False), of
# x = torch.arange(12.).reshape(3, 4)
FILES = Path(__file__).parent / "torch_files"
X = np.arange(12, dtype=np.float32).reshape(3, 4)
STATE = {
    "float": X,
    "transposed": X.T,
    "slice": X[1:, 1:3],
    "half": X.astype(np.float16),
    "bfloat16": X.astype(ml_dtypes.bfloat16),
    "double": X.astype(np.float64),
    "long": np.arange(3),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": X + 1,
}


@pytest.mark.parametrize("name", ["state_dict.pt", "state_dict_legacy.pt"])
def test_what_torch_wrote(name):
    read = weights.read(FILES / name)
    assert list(read) == list(STATE)
    for key, x in STATE.items():
        assert read[key].dtype == x.dtype
        np.testing.assert_array_equal(read[key], x)


@pytest.mark.parametrize("name", ["state_dict.pt", "state_dict_legacy.pt"])
@pytest.mark.parametrize("missing", [1, 100, 700, 1500, 1790])
def test_a_torch_file_cut_short(tmp_path, name, missing):
    whole = (FILES / name).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-missing])
    with pytest.raises(cli.UserError, match=r"cut\.pt"):
        weights.read(tmp_path / "cut.pt")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_by_name(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps({"x": RunsCode()}, 2)
    if legacy:
        parts = (weights.LEGACY_MAGIC, 1001, {})
        Path("bad.pt").write_bytes(b"".join(pickle.dumps(p, 2) for p in parts) + pickled)
    else:
        with zipfile.ZipFile("bad.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(cli.UserError, match=r"mkdir.*refused"):
        weights.read("bad.pt")
    assert not os.path.exists("ran")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    """What a forged file would read the memory beside its tensors with."""
    with zipfile.ZipFile(FILES / "state_dict.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    shape = b"K\x03K\x04\x86"  # the tuple (3, 4)
    assert shape in members[pickled]
    members[pickled] = members[pickled].replace(shape, b"K\x63K\x04\x86", 1)
    with zipfile.ZipFile(tmp_path / "forged.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(cli.UserError, match=r"forged\.pt"):
        weights.read(tmp_path / "forged.pt")


def test_safetensors(tmp_path):
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64)
    state = {np.dtype(kind).name: X.astype(kind) for kind in kinds}
    save_file(state, tmp_path / "model.safetensors")
    read = weights.read(tmp_path / "model.safetensors")
    assert set(read) == set(state)
    for name, x in state.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{", b"not a file of tensors at all"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(cli.UserError, match=name):
        weights.read(tmp_path / name)
    with pytest.raises(cli.UserError, match="elsewhere"):
        weights.read(tmp_path / "elsewhere" / name)


def test_a_checkpoint_that_is_no_state_dict(tmp_path):
    with zipfile.ZipFile(tmp_path / "run.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"epoch": 3, "lr": 0.1}, 2))
    with pytest.raises(cli.UserError, match=r"2 of its 2 entries.*epoch, lr"):
        weights.read(tmp_path / "run.pt")

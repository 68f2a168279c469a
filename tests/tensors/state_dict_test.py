"""Tensors by name: safetensors, torch's files, folders, and broken files."""

import os
import stat

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mert_jax.errors import UserError
from mert_jax.tensors import state_dict, torch_pickle

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def assert_same(read, state):
    assert set(read) == set(state)
    for name, x in state.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x)


def test_safetensors(tmp_path):
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64)
    state = {np.dtype(kind).name: X.astype(kind) for kind in kinds}
    save_file(state, tmp_path / "model.safetensors")
    assert_same(state_dict.read_tensors(tmp_path / "model.safetensors"), state)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{", b"not a file of tensors at all"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_broken_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        state_dict.read_tensors(tmp_path / name)
    with pytest.raises(UserError, match="elsewhere"):
        state_dict.read_tensors(tmp_path / "elsewhere" / name)


def test_safetensors_cut_short(tmp_path):
    save_file({"x": X, "y": X}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        state_dict.read_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, r"2 of its 2 entries.*epoch, lr"),
        ({"x": X, "step": 1}, r"1 of its 2 entries.*step"),
        ([X], "holds a list"),
    ],
)
def test_a_torch_file_that_is_no_state_dict(tmp_path, content, message):
    torch_pickle.write_pickle(tmp_path / "run.pt", content)
    with pytest.raises(UserError, match=message):
        state_dict.read_tensors(tmp_path / "run.pt")


# folders -----------------------------------------------------------------------------------------


def test_safetensors_are_preferred_to_torch(tmp_path):
    torch_pickle.write_pickle(tmp_path / "pytorch_model.bin", {"x": X})
    assert_same(state_dict.read_tensor_folder(tmp_path), {"x": X})
    save_file({"x": X + 1}, tmp_path / "model.safetensors")
    assert_same(state_dict.read_tensor_folder(tmp_path), {"x": X + 1})


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        state_dict.read_tensor_folder(tmp_path)


# writing -----------------------------------------------------------------------------------------


def test_transposed_and_sliced_arrays_are_written_as_they_read(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    state = {"t": x.T, "swapped": x.swapaxes(0, 2), "slice": x[:, ::2], "back": x[::-1], "x": x}
    state |= {"number": np.array(2.5, np.float32), "half": x.T.astype(ml_dtypes.bfloat16)}
    state_dict.write_tensors(tmp_path / "x.safetensors", state)
    assert_same(state_dict.read_tensors(tmp_path / "x.safetensors"), state)
    assert_same(load_file(tmp_path / "x.safetensors"), state)


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        state_dict.write_tensors(tmp_path / "x.safetensors", {"x": X})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "x.safetensors").st_mode) == 0o640


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"nowhere|No such file"):
        state_dict.write_tensors(tmp_path / "nowhere" / "x.safetensors", {"x": X})

"""Files and folders are written completely or not at all; files of JSON rows."""

import json
import os

import numpy as np
import pytest

from mert_jax import files
from mert_jax.errors import UserError
from mert_jax.files import JsonlFile


def fill(path: str, directory: bool) -> None:
    if directory:
        os.mkdir(path)
        path = os.path.join(path, "x")
    with open(path, "w") as f:
        f.write("new")


def interrupted(path, directory: bool, error: BaseException, **options) -> None:
    with files.atomic_write(str(path), **options) as temporary:
        fill(temporary, directory)
        raise error


@pytest.mark.parametrize("directory", [False, True])
def test_the_path_appears_at_the_end(tmp_path, directory):
    path = tmp_path / "deep" / "out"
    with files.atomic_write(str(path)) as temporary:
        fill(temporary, directory)
        assert not path.exists()
    assert path.is_dir() == directory
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError(), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, directory, error):
    raised = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised):
        interrupted(tmp_path / "out", directory, error)
    assert os.listdir(tmp_path) == []


def test_an_existing_file_stays_unless_replaced(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(UserError, match="exists already"), files.atomic_write(str(path)):
        pytest.fail("nothing should be written")
    assert path.read_text() == "old"
    with pytest.raises(KeyError):
        interrupted(path, False, KeyError(), replace=True)
    assert path.read_text() == "old"
    with files.atomic_write(str(path), replace=True) as temporary:
        fill(temporary, False)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot be written"), files.atomic_write(path) as temporary:
        fill(temporary, False)


def test_an_empty_directory_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"), files.atomic_write(str(tmp_path / "out")):
        pytest.fail("nothing should be written")


# rows of JSON


def test_dropped_rows_and_a_cut_line_are_removed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    rows = JsonlFile(str(path), lambda row: row["step"] <= 2)
    rows.write({"step": 3, "new": True})
    rows.drop(lambda row: row["step"] != 1)
    rows.write({"step": 4})
    rows.close()
    assert path.read_text() == '{"step": 2}\n{"step": 3, "new": true}\n{"step": 4}\n'


def test_no_file_before_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    JsonlFile(str(path), lambda row: True).close()
    assert not path.exists()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = JsonlFile(str(path), lambda row: True)
    rows.write({"loss": float("nan"), "norm": float("inf"), "books": [1.0, float("nan")], "n": 3})
    rows.close()
    # parse_constant is called for NaN and Infinity only, which other readers refuse
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert row == {"loss": None, "norm": None, "books": [1.0, None], "n": 3}
    assert np.isfinite(row["n"])


def test_a_full_disk_is_reported_with_the_way_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = JsonlFile(str(path), lambda row: True)
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written: .*No space.*same command"):
        rows.write({"step": 1})

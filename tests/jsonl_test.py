"""Rows that a resumed run goes on with, in JSON that every reader reads."""

import json

import numpy as np
import pytest

from mert_jax.errors import UserError
from mert_jax.files import JsonlFile


def test_rows_that_are_not_kept_are_dropped_and_a_cut_line_too(tmp_path):
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
    strict = lambda name: pytest.fail(f"{name} is not JSON")
    found = json.loads(path.read_text(), parse_constant=strict)
    assert found == {"loss": None, "norm": None, "books": [1.0, None], "n": 3}
    assert np.isfinite(found["n"])


def test_a_full_disk_is_said_with_the_way_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = JsonlFile(str(path), lambda row: True)
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written: .*No space.*same command"):
        rows.write({"step": 1})

"""Files and directories that appear whole or not at all."""

import os

import pytest

from mert_jax import files
from mert_jax.errors import UserError


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
def test_what_was_staged_appears_at_the_end(tmp_path, directory):
    path = tmp_path / "deep" / "out"
    with files.atomic_write(str(path)) as temporary:
        fill(temporary, directory)
        assert not path.exists()
    assert path.is_dir() == directory
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError(), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tmp_path, directory, error):
    raised = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised):
        interrupted(tmp_path / "out", directory, error)
    assert os.listdir(tmp_path) == []


def test_what_exists_stays_unless_it_may_be_replaced(tmp_path):
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


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot be written"), files.atomic_write(path) as temporary:
        fill(temporary, False)


def test_an_empty_directory_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"), files.atomic_write(str(tmp_path / "out")):
        pytest.fail("nothing should be written")

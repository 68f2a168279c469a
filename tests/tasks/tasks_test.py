"""Tasks read MARBLE's layouts, and say what is missing of them."""

import json

import pytest
import soundfile

from mert_jax.errors import UserError
from mert_jax.tasks import task as tasks
from mert_jax.tasks.registry import TABLE, get_task
from tests.labelled_music import COUNTS, WRITERS

# those of make_tasks are in make_tasks_test.py
OFFICIAL = sorted(name for name in TABLE if not name.startswith("made_"))


def test_there_are_the_fourteen_of_the_paper():
    assert sorted(WRITERS) == OFFICIAL
    assert len(OFFICIAL) == 14


@pytest.mark.parametrize("name", OFFICIAL)
def test_each_is_read_in_its_layout(tmp_path, name):
    task = get_task(name.lower())
    assert task.name == name
    assert task.kind in tasks.METRICS
    assert len(set(task.labels)) == len(task.labels)
    found = task.clips(WRITERS[name](tmp_path / "data"))
    assert list(found) == list(tasks.SPLITS)
    for split, clips in found.items():
        if task.kind != "separation":
            assert len(clips) == COUNTS[split]
        for clip in clips:
            assert soundfile.info(clip.path).frames
            if task.kind in ("classes", "key"):
                assert 0 <= clip.label < len(task.labels)
            elif task.kind == "tags":
                assert all(0 <= tag < len(task.labels) for tag in clip.label)
            elif task.kind == "regression":
                assert len(clip.label) == len(task.labels)
            elif task.kind == "separation":
                assert tuple(clip.label) == task.labels
    paths = [{clip.path for clip in clips} for clips in found.values()]
    assert len(set.union(*paths)) == sum(map(len, paths)), "a file is in two splits"


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_missing_data_set_is_a_line_that_says_how_to_get_it(tmp_path, name):
    task = get_task(name)
    with pytest.raises(UserError, match="is not there") as error:
        task.clips(str(tmp_path))
    assert task.source in str(error.value)
    assert "--data=" in task.source
    assert "\n" not in str(error.value)


def test_labels_are_the_official_ones():
    counts = {name: len(get_task(name).labels) for name in OFFICIAL}
    assert counts == {
        "EMO": 2,
        "GS": 24,
        "GTZANBeatTracking": 1,
        "GTZANGenre": 10,
        "MTGGenre": 87,
        "MTGInstrument": 40,
        "MTGMood": 56,
        "MTGTop50": 50,
        "MTT": 50,
        "MUSDB18": 4,
        "NSynthI": 11,
        "NSynthP": 128,
        "VocalSetS": 20,
        "VocalSetT": 10,
    }
    assert get_task("GS").labels[3] == "Eb major"
    assert get_task("NSynthP").labels[45] == "45"


def test_clips_of_one_track_are_a_group(tmp_path):
    clips = get_task("GS").clips(WRITERS["GS"](tmp_path))["test"]
    groups = [clip.group for clip in clips]
    assert len(set(groups)) == len(groups) // 2
    assert groups[0] == groups[1] != groups[2]


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="unknown task 'GTZAM'; there are EMO, GS"):
        get_task("GTZAM")


# jsonl -------------------------------------------------------------------------------------------


def write(folder, rows: list[dict], name: str = "X") -> str:
    folder.mkdir(exist_ok=True)
    for suffix in ("train", "val", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.{suffix}.jsonl").write_text(text)
    return str(folder)


def read(data: str, seconds: float = 0.0, kind: str = "classes") -> list[tasks.Clip]:
    about = dict(source="Get it.", licence="", paper="")
    return tasks.jsonl_task("X", kind, ("low", "high"), seconds, **about).clips(data)["train"]


@pytest.mark.parametrize("prefix", ["", "data/X/", "data/Y/", "./"])
def test_audio_is_found_below_the_data_folder(tmp_path, prefix):
    data = write(tmp_path / "X", [{"audio_path": f"{prefix}a/b.wav", "label": "high"}])
    (tmp_path / "X" / "a").mkdir()
    (tmp_path / "X" / "a" / "b.wav").write_bytes(b"")
    (clip,) = read(data)
    assert clip.label == 1
    assert (tmp_path / "X" / "a" / "b.wav").samefile(clip.path)


def test_audio_that_is_not_there_keeps_its_place(tmp_path):
    data = write(tmp_path / "X", [{"audio_path": "data/X/a/b.wav", "label": "low"}])
    assert read(data)[0].path == str(tmp_path / "X" / "a" / "b.wav")


@pytest.mark.parametrize(
    ("length", "starts"),
    [(95.0, [0, 30, 60]), (114.5, [0, 30, 60, 90]), (10.0, [0]), (30.0, [0])],
)
def test_files_are_cut_side_by_side(tmp_path, length, starts):
    row = {"audio_path": "a.wav", "label": "low", "duration": length}
    clips = read(write(tmp_path / "X", [row]), 30.0)
    assert [clip.start for clip in clips] == starts
    assert {clip.seconds for clip in clips} == {30.0}
    assert len({clip.group for clip in clips}) == 1


def test_beats_are_those_of_the_clip(tmp_path):
    label = {"beat": [0.5, 9.5, 10.5, 25.0]}
    row = {"audio_path": "a.wav", "label": label, "duration": 20.0}
    clips = read(write(tmp_path / "X", [row]), 10.0, "beats")
    assert [clip.label for clip in clips] == [(0.5, 9.5), (0.5,)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"audio_path": "a.wav", "label": "middle"}, "KeyError 'middle'"),
        ({"audio_path": "a.wav"}, "KeyError 'label'"),
        ({"label": "low"}, "KeyError 'audio_path'"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, row, said):
    data = write(tmp_path / "X", [{"audio_path": "a.wav", "label": "low"}, row])
    with pytest.raises(UserError, match=rf"X.train.jsonl, line 2: {said}"):
        read(data)

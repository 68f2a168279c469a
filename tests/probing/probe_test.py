"""The command from audio to results, what it keeps and what it refuses."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mert_jax.checkpoints import workdir
from mert_jax.errors import UserError
from mert_jax.extraction import embedder
from mert_jax.probing import beats, features, head, sampling
from mert_jax.probing.run import parse_layers, probe
from mert_jax.tasks.registry import get_task
from tests.extraction.small_student import checkpoint
from tests.labelled_music import COUNTS, WRITERS, with_ffmpeg
from tests.runs import slow

QUICK = head.HeadSettings(epochs=25, rates=(3e-3, 3e-2), seeds=2)


def some_layers(computed: list | None = None, noise: int = 2) -> features.Features:
    """Three layers of which only one, log-mel, has heard the music."""
    known = features.log_mel()
    rng = np.random.default_rng(0)

    def among_noise(x: np.ndarray) -> np.ndarray:
        if computed is not None:
            computed.append(len(x))
        others = rng.standard_normal((noise, *x.shape[1:])).astype(np.float32)
        return np.concatenate([others[:1], x, others[1:]])

    return known._replace(
        name="student",
        fingerprint="some layers",
        layers=1 + noise,
        pooled=lambda waves: map(among_noise, known.pooled(waves)),
        frames=lambda waves: map(among_noise, known.frames(waves)),
    )


def test_another_head_and_other_layers_embed_nothing_again(tmp_path):
    task, data = get_task("GTZANGenre"), WRITERS["GTZANGenre"](tmp_path / "data")
    computed = []
    made = [some_layers(computed)]
    output = str(tmp_path / "out")
    probe(task, data, output, made, QUICK)
    assert len(computed) == sum(COUNTS.values())
    shutil.move(tmp_path / "out" / "features", tmp_path / "kept")
    wide = QUICK._replace(hidden=8, epochs=5)
    found = probe(task, data, output, made, wide, (2, 1), str(tmp_path / "kept"))
    assert len(computed) == sum(COUNTS.values())
    (row,) = found["features"]
    assert row["head"] == "mlp of 8"
    assert [entry["layer"] for entry in row["by_layer"]] == ["2", "1"]
    assert row["layer"] == "1"
    found = probe(task, data, output, made, wide._replace(single=False), (), str(tmp_path / "kept"))
    assert [entry["layer"] for entry in found["features"][0]["by_layer"]] == ["sum"]
    with pytest.raises(UserError, match="layer 9 is not one of 0 to 2"):
        probe(task, data, output, made, wide, (9,), str(tmp_path / "kept"))


def test_the_same_seeds_give_the_same_results(tmp_path):
    task, data = get_task("GS"), WRITERS["GS"](tmp_path / "data")
    made = [features.log_mel()]
    runs = [
        probe(task, data, str(tmp_path / name), made, QUICK._replace(epochs=3)) for name in "ab"
    ]
    assert runs[0] == runs[1]


def test_labels_of_the_test_split_choose_nothing(tmp_path):
    """With the test labels turned round, the chosen layer and rate stay, and so does validation."""
    task, data = get_task("GTZANGenre"), WRITERS["GTZANGenre"](tmp_path / "data")
    turned = task._replace(
        clips=lambda data: {
            split: [c._replace(label=9 - c.label) if split == "test" else c for c in clips]
            for split, clips in task.clips(data).items()
        }
    )
    made, rows = [some_layers()], []
    for one in (task, turned):
        found = probe(one, data, str(tmp_path / "out"), made, QUICK._replace(epochs=5))
        rows.append(found["features"][0])
    for key in ("layer", "learning_rate", "valid"):
        assert rows[0][key] == rows[1][key]
    assert rows[1]["metrics"]["accuracy"]["mean"] < 0.1


def test_clips_in_train_and_test_are_refused(tmp_path):
    task, data = get_task("GTZANGenre"), WRITERS["GTZANGenre"](tmp_path / "data")
    shutil.copy(f"{data}/GTZANGenre.train.jsonl", f"{data}/GTZANGenre.test.jsonl")
    with pytest.raises(UserError, match="16 clips are in train and in test"):
        probe(task, data, str(tmp_path / "out"), [features.log_mel()], QUICK)


# the command -------------------------------------------------------------------------------------


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mert_jax.probe", *options],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkpoint_beside_its_untrained_self(tmp_path):
    workdir.write_checkpoint(str(tmp_path / "run"), checkpoint())
    data = WRITERS["NSynthP"](tmp_path / "data")
    done = command(
        f"--checkpoint={tmp_path / 'run'}", "--task=NSynthP", f"--data={data}",
        "--baselines=random", f"--output={tmp_path / 'out'}", "--epochs=3", "--learning_rates=1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in read["features"]] == ["student", "random"]
    student, random = read["features"]
    assert student["fingerprint"] != random["fingerprint"]
    names = [entry["layer"] for entry in student["by_layer"]]
    assert names[-1] == "sum"
    assert names[:-1] == [str(i) for i in range(len(names) - 1)]


@pytest.mark.slow
def test_a_students_frames_of_some_layers_go_into_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "TRAIN", 1024)
    monkeypatch.setattr(sampling, "VALID", 256)
    model = embedder.Model(checkpoint())
    made = features.student(model, layers=(2, 0))
    task = get_task("GTZANBeatTracking")
    short = task._replace(
        clips=lambda data: {
            split: [clip._replace(seconds=0.3, label=(0.1,))
                    for clip in clips[:3]]
            for split, clips in task.clips(data).items()
        }
    )  # fmt: skip
    data, quick = WRITERS[task.name](tmp_path / "data"), QUICK._replace(epochs=2)
    found = probe(short, data, str(tmp_path / "out"), [made], quick, (2, 0))
    assert [entry["layer"] for entry in found["features"][0]["by_layer"]] == ["2", "0"]
    assert found["features"][0]["decoder"] in beats.DECODERS


def test_the_command_prints_a_table_and_counts_what_it_left_out(tmp_path):
    data = WRITERS["NSynthI"](tmp_path / "data")
    broken = sorted((tmp_path / "data" / "nsynth-train" / "audio").iterdir())[0]
    broken.write_text("no audio")
    done = command(
        "--task=nsynthi", f"--data={data}", f"--output={tmp_path / 'out'}", "--epochs=5",
        "--baselines=log_mel", "--seeds=3", "--head=mlp", "--hidden=16", "--learning_rates=1e-2",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "NSynthI: 16 train, 8 valid, 8 test clips" in done.stdout
    assert "accuracy" in done.stdout
    assert "left out: 1 not audio" in done.stdout
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    (left,) = read["left_out"]
    assert (left["path"], left["split"], left["reason"]) == (str(broken), "train", "not audio")
    assert read["settings"]["hidden"] == 16
    assert len(read["features"][0]["metrics"]["accuracy"]["seeds"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task=MTT", "--baselines=log_mel"], "m-a-p/MTT"),
        pytest.param(
            ["--task=MUSDB18", "--baselines=log_mel"], "Download MUSDB18-HQ", marks=with_ffmpeg
        ),
        *slow(
            (["--task=none", "--baselines=log_mel"], "unknown task 'none'; there are EMO"),
            (["--task=MTT"], "nothing to probe"),
            (["--task=MTT", "--baselines=mel"], "unknown baseline 'mel'"),
            (["--task=MTT", "--layers=top", "--baselines=cqt"], "--layers=top: give all, sum"),
            (
                ["--task=MTT", "--learning_rates=x", "--baselines=cqt"],
                "--learning_rates: could not",
            ),
            (["--task=MTT", "--seeds=0"], "seeds"),
        ),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, options, message):
    (tmp_path / "data").mkdir()
    done = command(*options, f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_layers_are_parsed():
    assert parse_layers("all") == ((), True, True)
    assert parse_layers("sum") == ((), False, True)
    assert parse_layers("7,3,7") == ((7, 3), True, False)
    for wrong in ("", "-1", "1.5", "3,"):
        with pytest.raises(UserError):
            parse_layers(wrong)

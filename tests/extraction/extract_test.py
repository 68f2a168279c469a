"""Folders of real files through `extract`."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from mert_jax.checkpoints import huggingface
from mert_jax.data.decoding import decode
from mert_jax.errors import UserError
from mert_jax.extraction import embedder, files
from mert_jax.extraction.embedder import EmbeddingSettings
from mert_jax.extraction.files import StatesFile
from mert_jax.extraction.folder import extract, output_names
from tests.extraction.small_student import RATE, checkpoint, music
from tests.runs import ENVIRONMENT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory."""
    path = tmp_path_factory.mktemp("model") / "hf"
    path.mkdir()
    huggingface.write_checkpoint(str(path), checkpoint())
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Files of several formats, rates and lengths, one of which is broken."""
    root = tmp_path / "music"
    (root / "album").mkdir(parents=True)
    first, second, third, fourth = music(4_000, 7_350, 9_000, 1_330)  # two lengths of frames
    soundfile.write(root / "a.wav", first, 24_000)
    soundfile.write(root / "album" / "b.flac", np.stack([second, second[::-1]], 1), 44_100)
    soundfile.write(root / "album" / "c.ogg", third, 24_000)
    soundfile.write(root / "low.wav", fourth, 8_000)
    (root / "album" / "broken.wav").write_bytes(b"RIFF" + bytes(100))
    (root / "cover.jpg").write_bytes(b"no music")
    return root


def run(model, folder, output, dtype="float32", **settings):
    return extract(model, [str(folder)], str(output), EmbeddingSettings(**settings), dtype)


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def decoded(path):
    with decode(str(path)) as (_, blocks):
        return np.concatenate(list(blocks))


def test_a_folder(model, folder, tmp_path):
    out = tmp_path / "out"
    report = run(model, folder, out)
    assert (report["files"], report["embedded"]) == (6, 4)
    assert report["upsampled"] == ["low.wav"]
    assert report["not_audio"] == ["cover.jpg"]
    assert [x["name"] for x in report["failed"]] == ["album/broken.wav"]
    assert json.loads((out / "report.json").read_text()) == report
    names = {"a.npz", "album/b.npz", "album/c.npz", "low.npz"}
    assert {str(p.relative_to(out)) for p in out.rglob("*.npz")} == names
    assert not (out / ".staging").exists()
    loaded = embedder.load(model)
    for name, source in (("a", "a.wav"), ("album/b", "album/b.flac"), ("album/c", "album/c.ogg")):
        npz, wave = arrays(out / f"{name}.npz"), decoded(folder / source)
        expected = loaded(wave)
        np.testing.assert_allclose(npz["hidden_states"], expected, atol=1e-5)
        assert npz["hidden_states"].dtype == np.float32
        assert npz["layers"].tolist() == [0, 1, 2]
        assert npz["frame_rate"] == RATE
        np.testing.assert_allclose(npz["times"], (np.arange(expected.shape[1]) + 0.75) / RATE)


def test_means_are_a_table_too(model, folder, tmp_path):
    report = run(model, folder, tmp_path / "out", pool="mean", layers=(2, 0))
    run(model, folder, tmp_path / "frames")
    table = pq.read_table(tmp_path / "out" / "features.parquet").to_pydict()
    assert table["name"] == ["a.wav", "album/b.flac", "album/c.ogg", "low.wav"]
    assert sum(table["seconds"]) == pytest.approx(report["seconds"])
    for i, name in enumerate(("a", "album/b", "album/c", "low")):
        frames = arrays(tmp_path / "frames" / f"{name}.npz")["hidden_states"]
        states = arrays(tmp_path / "out" / f"{name}.npz")["hidden_states"]
        np.testing.assert_allclose(states, frames[[2, 0]].mean(1), atol=1e-5)
        np.testing.assert_array_equal(states, [table["layer_2"][i], table["layer_0"][i]])
        assert table["frames"][i] == frames.shape[1]


def test_half_precision_and_its_limit(model, folder, tmp_path, monkeypatch):
    run(model, folder, tmp_path / "full")
    run(model, folder, tmp_path / "half", dtype="float16")
    full, half = (arrays(tmp_path / name / "a.npz")["hidden_states"] for name in ("full", "half"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, full, rtol=1e-3, atol=1e-6)
    original = embedder.Embedder.run
    monkeypatch.setattr(
        embedder.Embedder,
        "run",
        lambda self, segments: ((row, x * 1e6) for row, x in original(self, segments)),
    )
    with pytest.raises(UserError, match=r"overflow.*does not fit into float16"):
        run(model, folder, tmp_path / "over", dtype="float16")
    assert not list((tmp_path / "over").rglob("*.npz"))


def test_long_files_are_embedded_in_chunks_or_windows(model, folder, tmp_path):
    options = dict(chunk=300 / RATE, context=20 / RATE)
    run(model, folder, tmp_path / "out", **options)
    run(model, folder, tmp_path / "windows", window=0.05)
    loaded, wave = embedder.load(model), decoded(folder / "album" / "c.ogg")
    for name, expected in (("out", options), ("windows", {"window": 0.05})):
        npz = arrays(tmp_path / name / "album" / "c.npz")
        (expected,) = loaded.embed([wave], **expected)
        np.testing.assert_allclose(npz["hidden_states"], expected, atol=1e-5)
    # 1,200 samples make 59 frames, the first of the next window begins 20 later
    assert np.diff(npz["times"])[[0, 58]] * RATE == pytest.approx([1, 2])


def test_a_stopped_run_resumes(model, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    original, names = StatesFile.finish, []

    def finish(self, output, name):
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(name)
        return original(self, output, name)

    monkeypatch.setattr(StatesFile, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        run(model, folder, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.npz")}
    assert len(before) == 2
    monkeypatch.setattr(StatesFile, "finish", original)
    report = run(model, folder, out)
    assert "2 of 5 files are done already" in capsys.readouterr().err
    assert report["embedded"] == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # a changed file and a missing result are embedded again
    soundfile.write(folder / "a.wav", music(5_000)[0], 24_000)
    (out / "low.npz").unlink()
    run(model, folder, out)
    assert arrays(out / "a.npz")["hidden_states"].shape[1] == 249
    after = {p for p in out.rglob("*.npz") if p.stat().st_mtime_ns != before.get(p)}
    assert {"a.npz", "low.npz"} <= {p.name for p in after}


def test_other_settings_are_refused(model, folder, tmp_path):
    run(model, folder, tmp_path / "out", pool="mean")
    with pytest.raises(UserError, match=r"made with pool=mean, now pool=none; give another"):
        run(model, folder, tmp_path / "out")
    run(model, folder, tmp_path / "out", pool="mean", batch=7.0)


def test_files_of_one_name_have_different_outputs(model, tmp_path):
    root = tmp_path / "music"
    root.mkdir()
    (wave,) = music(2_000)
    for name in ("x.wav", "x.flac", "y.wav"):
        soundfile.write(root / name, wave, 24_000)
    run(model, root, tmp_path / "out")
    outputs = {p.name for p in (tmp_path / "out").rglob("*.npz")}
    assert outputs == {"x.wav.npz", "x.flac.npz", "y.npz"}
    assert output_names(["a.wav", "a.wav", "b"]) == ["a.wav.npz", "a.wav~2.npz", "b.npz"]


def test_a_file_that_shrinks_between_its_two_readings(model, folder, tmp_path, monkeypatch):
    original = files.segments

    def segments(recording, *rest):
        if recording.source.name == "album/c.ogg":
            recording.moments.samples += 9_000
        return original(recording, *rest)

    monkeypatch.setattr(files, "segments", segments)
    report = run(model, folder, tmp_path / "out", chunk=300 / RATE, context=20 / RATE)
    assert [x["reason"] for x in report["failed"]] == ["not audio", "changed"]
    assert report["embedded"] == 3
    assert not (tmp_path / "out" / "album" / "c.npz").exists()


def command(model, folder, output, *more):
    flags = [f"--checkpoint={model}", f"--input={folder}", f"--output={output}", *more]
    return [sys.executable, "-m", "mert_jax.extract", *flags]


def run_command(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT)


def test_the_exit_code_is_1_if_a_file_is_bad(model, folder, tmp_path):
    done = run_command(model, folder, tmp_path / "out", "--layers=2", "--pool=mean")
    assert done.returncode == 1, done.stderr
    assert "4 of 6 files" in done.stdout
    assert "album/broken.wav" in done.stdout
    (folder / "album" / "broken.wav").unlink()
    done = run_command(model, folder, tmp_path / "out", "--layers=2", "--pool=mean")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 files are done already" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere does not exist"),
        ({"folder": "/nowhere"}, "--input=/nowhere does not exist"),
        ({"more": "--layers=7"}, "layer 7 of a model"),
        ({"more": "--layers=last"}, "--layers=last is not all"),
        ({"more": "--context_seconds=40"}, "no room for 40 s"),
    ],
)
def test_mistakes_end_in_one_line(model, folder, tmp_path, change, message):
    chosen = dict(model=model, folder=folder, more="--pool=none") | change
    done = run_command(chosen["model"], chosen["folder"], tmp_path / "out", chosen["more"])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/**/*.npz"))


def test_a_full_disk(model, folder, tmp_path):
    limited = ["bash", "-c", 'ulimit -f 30 && exec "$@"', "bash"]  # files of 30 KiB at most
    arguments = command(model, folder, tmp_path / "out")
    done = subprocess.run([*limited, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^error: cannot write .*/out: .*finished files are kept", done.stderr, re.M)
    for path in (tmp_path / "out").rglob("*.npz"):  # complete if they exist
        arrays(path)
    assert run_command(model, folder, tmp_path / "out").returncode == 1


def test_nothing_heavy_is_imported(model):
    code = (
        "import sys, numpy, mert_jax\n"
        f"mert_jax.load({model!r})(numpy.zeros(700))\n"
        "print([x for x in ('torch', 'tensorflow') if x in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout.strip() == "[]", done.stderr

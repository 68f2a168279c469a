"""The command: what goes in and what is left out, stopping, going on, adding, and exit codes."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from mert_jax import files
from mert_jax.data import records
from mert_jax.data.preparation import assemble, prepare_dataset, selection, sources, workers
from mert_jax.data.preparation.selection import PreparationSettings
from mert_jax.data.preparation.sources import stage as real_stage
from mert_jax.errors import UserError

# Small chunks, so that short files make many records.
SMALL = PreparationSettings(
    chunk_seconds=1.0, crop_seconds=0.32, min_seconds=0.5, validation_fraction=0.3
)


def noise(seed, seconds, sample_rate=24_000, channels=1):
    """Noise f64 [n, channels] within int16 range; 16-bit files at 24 kHz hold it exactly."""
    rng = np.random.default_rng(seed)
    shape = (round(seconds * sample_rate), channels)
    return rng.integers(-9_000, 9_000, shape).astype(np.int16)


def write(path, seed, seconds, sample_rate=24_000, channels=1, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seed, seconds, sample_rate, channels), sample_rate, **kwargs)


@pytest.fixture
def music(tmp_path):
    """Seven tracks in nested folders, of different formats and lengths."""
    root = tmp_path / "music"
    write(root / "a.wav", 0, 3.33)
    write(root / "b" / "b.flac", 1, 2.0, 44_100, 2)
    write(root / "b" / "c" / "c.ogg", 2, 4.1, 48_000, 2)
    write(root / "d.wav", 3, 0.9, 8_000)
    for i in range(3):
        write(root / f"e{i}.wav", 10 + i, 1.5 + i)
    return root


def run(music, output, settings=SMALL, workers=2):
    return prepare_dataset.prepare([str(music)], str(output), settings, workers)


def shards(output):
    """Every byte that training reads, by file name."""
    names = [p for p in Path(output).iterdir() if ".array_record-" in p.name]
    names += [Path(output) / name for name in ("metadata.json", "features.json")]
    names += [Path(output) / name for name in ("dataset_info.json", "tracks.jsonl")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


def tracks(output):
    """Samples of every track, put together from its records, by (split, path)."""
    pieces_of = {}
    for split, split_info in records.metadata(str(output))["splits"].items():
        if split_info["records"]:
            for item in records.open_source(str(output), split):
                key = split, item["path"]
                pieces_of.setdefault(key, []).append((item["offset"], item["audio"]))
    waves = {}
    for key, pieces in pieces_of.items():
        wave = np.zeros(max(offset + len(audio) for offset, audio in pieces), np.int16)
        for offset, audio in pieces:
            before = wave[offset : offset + len(audio)]
            overlap = before != 0
            np.testing.assert_array_equal(before[overlap], audio[overlap])
            wave[offset : offset + len(audio)] = audio
        waves[key] = wave
    return waves


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def counting_stage(source, staging, log):
    """Decode as the real function does, and leave a line for each call."""
    with open(log, "a") as file:
        file.write(source.name + "\n")
    return real_stage(source, staging)


@pytest.fixture
def decodes(tmp_path, monkeypatch):
    """The names of the files decoded so far, in every process; calling it empties the list."""
    log = tmp_path / "decoded.log"
    monkeypatch.setattr(sources, "stage", functools.partial(counting_stage, log=str(log)))

    def names():
        decoded = sorted(log.read_text().split("\n")[:-1]) if log.exists() else []
        log.unlink(missing_ok=True)
        return decoded

    return names


def test_chunks_put_together_give_the_tracks(music, tmp_path):
    report = run(music, tmp_path / "out")
    waves = {path: wave for (_, path), wave in tracks(tmp_path / "out").items()}
    assert set(waves) == {"a.wav", "b/b.flac", "b/c/c.ogg", "d.wav", "e0.wav", "e1.wav", "e2.wav"}
    np.testing.assert_array_equal(waves["a.wav"], noise(0, 3.33)[:, 0])
    np.testing.assert_array_equal(waves["e2.wav"], noise(12, 3.5)[:, 0])
    assert abs(len(waves["b/b.flac"]) - 48_000) <= 1
    assert report["tracks"] == report["files"] == 7
    assert report["sample_rates"] == {"24000 Hz": 4, "44100 Hz": 1, "48000 Hz": 1, "8000 Hz": 1}
    assert report["formats"] == {"FLAC/PCM_16": 1, "OGG/VORBIS": 1, "WAV/PCM_16": 5}


def test_metadata_tells_training_what_it_needs(music, tmp_path):
    report = run(music, tmp_path / "out")
    metadata = records.metadata(str(tmp_path / "out"))
    assert metadata["sample_rate"] == 24_000
    assert metadata["hop_length"] == 320
    assert metadata["chunk_samples"] == 24_000
    assert metadata["overlap_samples"] == 7_680
    assert metadata["short_tracks"] == 0
    assert metadata["fingerprint"] == report["fingerprint"]
    samples = sum(len(wave) for wave in tracks(tmp_path / "out").values())
    splits = metadata["splits"]
    assert splits["train"]["tracks"] + splits["validation"]["tracks"] == 7
    assert splits["validation"]["tracks"] > 0
    hours = splits["train"]["hours"] + splits["validation"]["hours"]
    assert hours == pytest.approx(samples / 24_000 / 3_600, abs=1e-4)
    for split in ("train", "validation"):
        source = records.open_source(str(tmp_path / "out"), split)
        assert len(source) == splits[split]["records"]
        assert all(item["offset"] % 320 == 0 for item in source)


def test_shards_do_not_depend_on_workers_nor_order(music, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "SHARD_BYTES", 200_000)
    run(music, tmp_path / "one", workers=1)
    run(music, tmp_path / "two", workers=3)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    names = [name for name in shards(tmp_path / "one") if "train.array_record" in name]
    assert len(names) > 2
    for name in names:
        assert (tmp_path / "one" / name).stat().st_size < 2 * 200_000 + 70_000
    reports = [(tmp_path / d / "report.json").read_text() for d in ("one", "two")]
    assert reports[0] == reports[1]


def test_short_tracks_are_kept_and_counted(tmp_path):
    write(tmp_path / "in" / "short.wav", 0, 0.6)
    write(tmp_path / "in" / "long.wav", 1, 3)
    settings = SMALL._replace(crop_seconds=0.96)
    run(tmp_path / "in", tmp_path / "out", settings)
    assert records.metadata(str(tmp_path / "out"))["short_tracks"] == 1
    lengths = sorted(len(w) for w in tracks(tmp_path / "out").values())
    assert lengths == [14_400, 72_000]


def test_every_reason_to_skip_a_file(tmp_path, monkeypatch):
    root = tmp_path / "in"
    write(root / "good.wav", 0, 2)
    write(root / "zz copy.flac", 0, 2)  # the same samples in another format
    write(root / "short.wav", 1, 0.4)
    soundfile.write(root / "silent.wav", np.zeros(48_000), 24_000)
    quiet = np.random.default_rng(0).integers(-2, 3, 48_000).astype(np.int16)
    soundfile.write(root / "dither.wav", quiet, 24_000)
    wave = np.full(24_000, 0.1)
    wave[5] = np.nan
    soundfile.write(root / "nan.wav", wave, 24_000, subtype="FLOAT")
    soundfile.write(root / "none.wav", np.zeros(0), 24_000)
    (root / "empty.mp3").touch()
    (root / "text.ogg").write_text("text " * 999)
    (root / "cover.jpg").write_bytes(b"\xff\xd8")
    (root / "notes.TXT").write_text("x")
    write(root / "cut.wav", 2, 2)
    (root / "cut.wav").write_bytes((root / "cut.wav").read_bytes()[:50_000])
    (root / "dangling.wav").symlink_to(root / "gone.wav")
    os.mkfifo(root / "pipe.wav")
    (root / "book.m4a").write_bytes(b"\0\0\0 ftypM4A " * 99)
    (root / "again").symlink_to(root)  # a loop
    monkeypatch.setenv("PATH", "")
    report = run(root, tmp_path / "out")
    reasons = {line["path"]: line["reason"] for line in report["left_out"]}
    assert reasons == {
        "zz copy.flac": "duplicate",
        "short.wav": "too short",
        "silent.wav": "silent",
        "dither.wav": "silent",
        "nan.wav": "NaN or Inf",
        "none.wav": "empty",
        "empty.mp3": "empty",
        "text.ogg": "not audio",
        "cover.jpg": "not audio",
        "notes.TXT": "not audio",
        "cut.wav": "truncated",
        "dangling.wav": "unreadable",
        "pipe.wav": "unreadable",
        "book.m4a": "needs ffmpeg",
    }
    details = {line["path"]: line["detail"] for line in report["left_out"]}
    assert "good.wav" in details["zz copy.flac"]
    assert "0.40 s" in details["short.wav"]
    assert "--min_seconds=0.5" in details["short.wav"]
    assert report["tracks"] == 1
    assert report["files"] == 15
    assert sum(report["left_out_counts"].values()) == 14
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_files_without_permission(music, tmp_path):
    (music / "a.wav").chmod(0)
    (music / "b" / "c").chmod(0)
    if os.access(music / "a.wav", os.R_OK):
        pytest.skip("root reads every file; run as another user")
    report = run(music, tmp_path / "out")
    (music / "b" / "c").chmod(0o755)
    reasons = {line["path"]: line["reason"] for line in report["left_out"]}
    assert reasons == {"a.wav": "unreadable", "b/c": "unreadable"}
    (music / "a.wav").chmod(0o644)
    assert run(music, tmp_path / "out")["tracks"] == 7


def test_clipped_samples_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    wave = np.full(24_000, 0.25)
    wave[:7] = [1.5, -2, 1.0, 1e30, -1.0, 0.9999, -1.001]
    soundfile.write(tmp_path / "in" / "hot.wav", wave, 24_000, subtype="FLOAT")
    assert run(tmp_path / "in", tmp_path / "out")["clipped_samples"] == 5


def test_a_second_run_decodes_nothing(music, tmp_path, decodes, capsys):
    first = run(music, tmp_path / "out")
    assert len(decodes()) == 7
    before = shards(tmp_path / "out")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*array_record*")}
    assert run(music, tmp_path / "out") == first
    assert decodes() == []
    assert "is complete" in capsys.readouterr().err
    assert shards(tmp_path / "out") == before
    for name, mtime_ns in times.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == mtime_ns


def test_added_changed_and_removed_files(music, tmp_path, decodes):
    out = tmp_path / "out"
    run(music, out)
    splits_before = {path: split for split, path in tracks(out)}
    decodes()

    write(music / "new" / "n.wav", 77, 2.5)
    run(music, out)
    assert decodes() == ["new/n.wav"]
    now = {path: split for split, path in tracks(out)}
    assert now.pop("new/n.wav")
    assert now == splits_before

    write(music / "e1.wav", 78, 2.5)
    run(music, out)
    assert decodes() == ["e1.wav"]
    changed = {path: wave for (_, path), wave in tracks(out).items()}
    np.testing.assert_array_equal(changed["e1.wav"], noise(78, 2.5)[:, 0])

    (music / "a.wav").unlink()
    run(music, out)
    assert decodes() == []
    assert "a.wav" not in {path for _, path in tracks(out)}

    run(music, tmp_path / "fresh")
    assert shards(out) == shards(tmp_path / "fresh")


def test_a_removed_original_leaves_its_copy(tmp_path, decodes):
    write(tmp_path / "in" / "a.wav", 0, 2)
    write(tmp_path / "in" / "b.wav", 0, 2)
    run(tmp_path / "in", tmp_path / "out")
    decodes()
    (tmp_path / "in" / "a.wav").unlink()
    run(tmp_path / "in", tmp_path / "out")
    assert decodes() == []
    assert {path for _, path in tracks(tmp_path / "out")} == {"b.wav"}


def command(*args):
    return [sys.executable, "-m", "mert_jax.prepare", *args]


SMALL_FLAGS = (
    "--chunk_seconds=1 --crop_seconds=0.32 --min_seconds=0.5 --validation_fraction=0.3 --workers=1"
).split()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(tmp_path, decodes, signum):
    root, out = tmp_path / "in", tmp_path / "out"
    for i in range(9):
        write(root / f"{i:02d}.flac", i, 15, 44_100, 2)
    arguments = [f"--input={root}", f"--output={out}", *SMALL_FLAGS]
    process = subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    journal = out / ".staging" / sources.JOURNAL
    deadline = time.monotonic() + 30
    while not (journal.exists() and journal.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signum)
    _, error = process.communicate()
    if signum == signal.SIGINT:
        assert process.returncode == 130
        assert "run the same command again" in error
        assert "Traceback" not in error
    with pytest.raises(UserError, match="not finished"):
        records.open_source(str(out), "train")
    # what is half written must not be trusted
    with journal.open("a") as file:
        file.write('{"path": "half a li')
    finished = {source.name for source, _ in sources.read_lines(str(journal))}
    assert 3 <= len(finished) < 9
    run(root, out)
    assert set(decodes()) == {f"{i:02d}.flac" for i in range(9)} - finished
    run(root, tmp_path / "straight")
    assert shards(out) == shards(tmp_path / "straight")
    assert not (out / ".staging").exists()


def test_samples_cut_short_by_a_crash_are_decoded_again(music, tmp_path, decodes, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "build", lambda *a: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(music, out)
    assert len(decodes()) == 7
    audio = sorted((out / ".staging" / "audio").iterdir())
    audio[0].write_bytes(audio[0].read_bytes()[:-2])
    with open(out / ".staging" / sources.JOURNAL, "a") as file:
        file.write('{"path": "half a li')  # what comes after it must not be lost with it
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "build", lambda *a: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(music, out)
    assert len(decodes()) == 1
    run(music, out)
    assert decodes() == []
    run(music, tmp_path / "straight")
    assert shards(out) == shards(tmp_path / "straight")


def test_the_switch_to_a_new_dataset_may_stop_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "SHARD_BYTES", 200_000)
    music = tmp_path / "music"
    for i in range(3):
        write(music / f"{i}.wav", i, 4)
    run(music, tmp_path / "old")
    (music / "1.wav").unlink()
    run(music, tmp_path / "expected")
    real = {name: getattr(os, name) for name in ("replace", "unlink")}

    for stop in range(100):
        out = tmp_path / f"out{stop}"
        subprocess.run(["cp", "-r", tmp_path / "old", out], check=True)
        left = [stop]

        def step(name, *args, left=left, **kwargs):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return real[name](*args, **kwargs)

        def stopping(output, stage_dir, step=step, switch=assemble.switch):
            if (Path(stage_dir) / "ready").exists():
                for name in real:
                    monkeypatch.setattr(assemble.os, name, functools.partial(step, name))
            try:
                return switch(output, stage_dir)
            finally:
                for name, function in real.items():
                    monkeypatch.setattr(assemble.os, name, function)

        with monkeypatch.context() as patch:
            patch.setattr(assemble, "switch", stopping)
            try:
                run(music, out)
            except Stopped:
                if (out / "dataset_info.json").exists():  # then it is whole: the old or the new
                    assert shards(out) in (shards(tmp_path / "old"), shards(tmp_path / "expected"))
            else:
                break
        run(music, out)
        assert shards(out) == shards(tmp_path / "expected"), stop
    assert stop > 10


def test_a_locked_output_is_refused(music, tmp_path):
    with (
        files.directory_lock(str(tmp_path / "out")),
        pytest.raises(UserError, match="another process"),
    ):
        run(music, tmp_path / "out")
    assert run(music, tmp_path / "out")["tracks"] == 7


def test_other_settings_are_refused_with_both_values(music, tmp_path):
    run(music, tmp_path / "out")
    with pytest.raises(UserError, match=r"chunk_seconds=1\.0, now chunk_seconds=2\.0.*--output"):
        run(music, tmp_path / "out", SMALL._replace(chunk_seconds=2.0))
    with pytest.raises(UserError, match=r"validation_fraction=0\.3, now validation_fraction=0\.1"):
        run(music, tmp_path / "out", SMALL._replace(validation_fraction=0.1))


def test_the_output_may_lie_inside_the_input(music, decodes):
    first = run(music, music / "out")
    assert first["files"] == 7
    decodes()
    assert run(music, music / "out") == first
    assert decodes() == []
    with pytest.raises(UserError, match="also an --input"):
        run(music, music)


def test_overlapping_inputs_are_read_once(music, tmp_path):
    inputs = [str(music), str(music / "b"), str(music / "a.wav")]
    assert prepare_dataset.prepare(inputs, str(tmp_path / "out"), SMALL, 1)["files"] == 7
    assert "b/c/c.ogg" in {path for _, path in tracks(tmp_path / "out")}  # the first input names it


def test_a_file_given_by_name_is_tried_whatever_its_suffix(music, tmp_path):
    (music / "a.wav").rename(music / "a.sound")
    report = prepare_dataset.prepare([str(music / "a.sound")], str(tmp_path / "out"), SMALL, 1)
    assert report["tracks"] == 1
    assert report["splits"]["validation"]["tracks"] == 0


def dying_stage(source, staging):
    if source.name == "bad.wav":
        os.kill(os.getpid(), signal.SIGSEGV)
    return real_stage(source, staging)


def test_a_decoder_that_crashes_costs_one_file(music, tmp_path, monkeypatch):
    write(music / "bad.wav", 5, 9)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "stage", dying_stage)
        report = run(music, tmp_path / "out")
    assert report["tracks"] == 7
    (line,) = report["left_out"]
    assert line == {
        "path": "bad.wav",
        "reason": "decoder died",
        "detail": "killed by SIGSEGV",
    }
    # a machine with more memory may read it: it is tried again
    assert run(music, tmp_path / "out")["tracks"] == 8


def act(job):
    """A job of the pool, told what to do."""
    if job == "raise":
        raise KeyError("our fault")
    if job == "full":
        raise OSError(28, "No space left on device")
    if isinstance(job, str) and job.startswith("once"):
        marker = Path(job.removeprefix("once "))
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_the_pool_gives_every_result(tmp_path):
    jobs = [*range(20), f"once {tmp_path / 'marker'}"]
    results = list(workers.run_jobs(act, jobs, 3))
    assert len(results) == len(jobs)
    assert set(results) == {(job, job, "") for job in jobs}


def test_the_pool_raises_what_is_not_the_files_fault():
    with pytest.raises(OSError, match="No space left"):
        list(workers.run_jobs(act, [1, "full"], 2))
    with pytest.raises(RuntimeError, match="our fault"):
        list(workers.run_jobs(act, [1, "raise"], 2))


def make(ids, samples=24_000):
    return [assemble.Track(track, f"{track}.wav", samples) for track in ids]


def test_the_split_is_stable_when_tracks_are_added():
    rng = np.random.default_rng(0)
    ids = [f"{int(x):016x}" for x in rng.integers(0, 2**64, 2_000, np.uint64)]
    before = assemble.split_tracks(make(ids[:1_000]), 0.05)
    after = assemble.split_tracks(make(ids), 0.05)
    for split in before:
        assert set(before[split]) <= set(after[split])
    assert 20 <= len(before["validation"]) <= 85
    assert assemble.split_tracks(make(ids[:1_000][::-1]), 0.05) == before


def test_both_splits_hold_something_with_two_tracks_or_more():
    low, high, higher = "00" * 8, "ee" * 8, "ff" * 8
    ids = [[t.track for t in s] for s in assemble.split_tracks(make([high, higher]), 0.05).values()]
    assert ids == [[higher], [high]]
    ids = [
        [t.track for t in s]
        for s in assemble.split_tracks(make([low, low[:-1] + "1"]), 0.05).values()
    ]
    assert ids == [["0" * 15 + "1"], [low]]
    assert assemble.split_tracks(make([low]), 0.05) == {"train": make([low]), "validation": []}
    assert assemble.split_tracks(make([low, high]), 0)["validation"] == []


def test_the_fingerprint_depends_on_tracks_lengths_and_settings():
    def fingerprint(tracks, settings=SMALL):
        return selection.describe({"train": tracks}, settings)["fingerprint"]

    tracks = make(["a", "b"])
    assert fingerprint(tracks) == fingerprint(tracks[::-1])
    others = [
        fingerprint(tracks[:1]),
        fingerprint(make(["a", "b"], 24_001)),
        fingerprint(tracks, SMALL._replace(chunk_seconds=2.0)),
    ]
    assert len({fingerprint(tracks), *others}) == 4


def test_shards_are_filled_in_order():
    assert assemble.shard_lengths([4, 4, 4, 4, 9, 1], 8) == [2, 2, 1, 1]
    assert assemble.shard_lengths([], 8) == []


def test_selection_names_the_first_of_equal_files():
    def entry(name, track, samples=24_000):
        return sources.SourceFile(f"/{name}", name, 1, 1), sources.Outcome(track, samples)

    files = [entry("a", "x"), entry("b", "x"), entry("c", "y", 100)]
    tracks, _, left_out = selection.select(files, 1.0)
    assert [t.path for t in tracks] == ["a"]
    assert [(n, r) for n, r, _ in left_out] == [("b", "duplicate"), ("c", "too short")]


def call(*args, **kwargs):
    return subprocess.run(command(*args), capture_output=True, text=True, **kwargs)


def test_the_command_prepares_and_prints_a_summary(music, tmp_path):
    (music / "cover.jpg").touch()
    (music / "broken.mp3").write_text("nothing here")
    out = tmp_path / "out"
    done = call(f"--input={music / 'a.wav'},{music / 'b'}", f"--input={music}", f"--output={out}")
    assert done.returncode == 0, done.stderr
    assert "7 tracks" not in done.stdout  # d.wav is shorter than the default minimum
    assert "6 tracks" in done.stdout
    for words in ("train: ", "validation: ", "1 too short", "broken.mp3: not audio"):
        assert words in done.stdout
    assert "cover.jpg" not in done.stdout
    assert "Traceback" not in done.stderr
    again = call(f"--input={music}", f"--output={out}")
    assert again.returncode == 0


def test_a_single_track_is_all_train(music, tmp_path):
    done = call(f"--input={music / 'a.wav'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0
    assert "a single track cannot be divided" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--input and --output are needed"),
        (["--input=IN"], "--input and --output are needed"),
        (["--input=nowhere", "--output=OUT"], "nowhere does not exist"),
        (["--input=IN/empty", "--output=OUT"], "no file in"),
        (["--input=IN/texts", "--output=OUT"], "no usable audio in 1 files: 1 not audio"),
        (["--input=IN", "--output=IN"], "also an --input"),
        (["--input=IN", "--output=IN/good.wav/out"], "cannot write"),
        (["--input=IN", "--output=/proc/none/out"], "cannot write"),
        (["--input=IN", "--output=gs://bucket/out"], "not on a local disk"),
        (["--input=IN", "--output=OUT", "--crop_seconds=40"], "must be longer than"),
        (["--input=IN", "--output=OUT", "--workers=0"], "workers"),
        (["--input=IN", "--output=OUT", "--chunk_seconds=x"], "chunk_seconds"),
        (["--input=IN", "--output=OUT", "--nonsense"], "nonsense"),
        (["IN", "--output=OUT"], "unexpected argument"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, arguments, words):
    root = tmp_path / "in"
    write(root / "good.wav", 0, 2)
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "x.txt").touch()
    flags = [a.replace("IN", str(root)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    done = call(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [x for x in done.stderr.split("\n") if x]
    assert line.startswith("error: ")
    assert words in line


def test_no_usable_file_still_leaves_a_report(tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "silent.wav", np.zeros(48_000), 24_000)
    with pytest.raises(UserError, match="no usable audio in 1 files: 1 silent"):
        run(tmp_path / "in", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left_out"][0]["reason"] == "silent"


def test_a_full_disk_ends_in_one_line_and_the_run_resumes(music, tmp_path, monkeypatch, decodes):
    def full(path, serialised):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_shard", full)
        with pytest.raises(UserError, match="No space left on device"):
            run(music, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(assemble.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(UserError, match=r"0\.00 GB free, and needs 0\.00 GB more"):
            run(music, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(assemble.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(UserError, match=r"0\.00 GB free, and needs 0\.00 GB more"):
            run(music, tmp_path / "out")
    with pytest.raises(UserError, match="not finished"):
        records.metadata(str(tmp_path / "out"))
    decodes()
    assert run(music, tmp_path / "out")["tracks"] == 7
    assert decodes() == []


_PEAK = """
import re, resource, sys
from mert_jax.data.preparation.selection import PreparationSettings
from mert_jax.data.preparation.prepare_dataset import prepare
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], PreparationSettings(), 1)
    # ru_maxrss of this process would start at what pytest used
    own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_mib(tmp_path, minutes):
    """Peak memory of any process preparing one file of so many minutes."""
    (tmp_path / f"in{minutes}").mkdir()
    with soundfile.SoundFile(tmp_path / f"in{minutes}" / "a.wav", "w", 8_000, 1) as file:
        for i in range(minutes):
            file.write(np.roll(noise(0, 60, 8_000)[:, 0], i))
    arguments = [str(tmp_path / f"in{minutes}"), str(tmp_path / f"out{minutes}")]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True
    )
    return max(map(int, done.stdout.split())) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; run on Linux")
def test_memory_does_not_grow_with_the_length(tmp_path):
    # an hour is 165 MiB of int16 at 24 kHz: loading it whole would show
    assert 20 < peak_mib(tmp_path, 60) < peak_mib(tmp_path, 2) + 60


def test_nothing_is_left_running(music, tmp_path):
    before = threading.active_count()
    run(music, tmp_path / "out")
    assert threading.active_count() == before

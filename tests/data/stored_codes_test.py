"""Stored codes: equal to those of whole tracks, aligned to their samples, refused if foreign."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile

from mert_jax import teachers
from mert_jax.constants import FULL_SCALE, HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import pipeline, records, stored_codes
from mert_jax.data.preparation import encode
from mert_jax.data.preparation.assemble import stored_tracks
from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.pretraining import build, step
from mert_jax.teachers import encodec_checkpoint
from mert_jax.teachers.teacher import Teacher
from tests import small
from tests.codec_samples import music, params, write_codec

# longer than a piece of the encoder and than a record, and shorter than the codec's padding
SECONDS = {"long": 23.3337, "short": 2.05, "shorter": 0.07}


class Bar:
    """What encode needs of a progress bar."""

    total = done = 0.0

    def update(self, seconds):
        self.done += seconds


def prepare(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mert_jax.prepare", *flags]
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_codec(str(tmp_path_factory.mktemp("codec")))


@pytest.fixture(scope="module")
def dataset(checkpoint, tmp_path_factory) -> str:
    """Three tracks and their codes, by the command."""
    folder = tmp_path_factory.mktemp("music")
    for seed, (name, seconds) in enumerate(SECONDS.items()):
        soundfile.write(folder / f"{name}.wav", music(seconds, seed), SAMPLE_RATE)
    output = str(tmp_path_factory.mktemp("data") / "prepared")
    flags = ["--chunk_seconds=5", "--crop_seconds=2", "--min_seconds=0.01"]
    done = prepare(f"--input={folder}", f"--output={output}", f"--codes={checkpoint}", *flags)
    assert done.returncode == 0, done.stderr
    assert "codes of train: 3 codebooks of 16, perplexity" in done.stdout
    return output


@pytest.fixture(scope="module")
def teacher(checkpoint) -> Teacher:
    return teachers.make("rvq_vae", checkpoint=checkpoint)


def whole_tracks(directory: str, teacher: Teacher) -> dict[str, np.ndarray]:
    """Codes of every track encoded at once, by its hash."""
    codes = {}
    for track, stored in stored_tracks(directory).items():
        source = records.open_source(directory, stored.split)
        audio = np.concatenate(list(encode.track_audio(source, stored)))
        assert len(audio) == stored.samples
        wave = audio[None].astype(np.float32) / FULL_SCALE
        codes[track] = np.asarray(jax.jit(teacher.apply)(teacher.params, wave))[0]
    return codes


def stored(directory: str) -> dict[str, stored_codes.CodesInfo]:
    return {"rvq_vae": stored_codes.read_info(directory, "rvq_vae")}


def test_stored_codes_are_those_of_whole_tracks(dataset, teacher):
    expected_of = whole_tracks(dataset, teacher)
    seen = equal = total = 0
    for split in ("train", "validation"):
        source = records.open_source(dataset, split)
        stored_codes.attach(source, split, stored(dataset), 0.0)
        for item in source:
            codes = item["codes"]["rvq_vae"]
            first = item["offset"] // HOP_LENGTH
            expected = expected_of[item["track"]][first : first + len(codes)]
            assert codes.shape == expected.shape
            # piece by piece, the last bit may differ, and with it a nearly tied code
            equal, total, seen = equal + (codes == expected).sum(), total + codes.size, seen + 1
    assert seen > len(SECONDS)
    assert equal / total > 0.999


def test_codes_go_with_their_samples(dataset, teacher):
    """A crop's codes are the track's at the crop's frames, in every batch and on every host."""
    codes_of = whole_tracks(dataset, teacher)
    source = records.open_source(dataset, "train")
    stored_codes.attach(source, "train", stored(dataset), 0.0)
    options = dict(num_samples=HOP_LENGTH * 50, batch_size=8, seed=1, threads=2)
    batches = list(itertools.islice(pipeline.train_stream([source], **options), 3))
    agree = []
    for batch in batches:
        assert batch["codes"]["rvq_vae"].shape == (8, 50, 3)
        for row, looped in enumerate(batch["looped"]):
            if not looped:
                item = source[int(batch["record"][row])]
                first = (item["offset"] + int(batch["start"][row])) // HOP_LENGTH
                expected = codes_of[item["track"]][first : first + 50]
                agree.append((batch["codes"]["rvq_vae"][row] == expected).mean())
    assert len(agree) > 8
    assert np.mean(agree) > 0.999
    halves = [
        list(itertools.islice(pipeline.train_stream([source], **options, rows=rows), 3))
        for rows in (range(4), range(4, 8))
    ]
    for k, batch in enumerate(batches):
        both = jax.tree.map(lambda *x: np.concatenate(x), halves[0][k], halves[1][k])
        jax.tree.map(np.testing.assert_array_equal, both, batch)


def test_a_second_run_encodes_nothing_and_new_tracks_only(
    dataset, checkpoint, tmp_path, monkeypatch
):
    encoded = []
    real = encode._encode

    def spy(teacher, todo, *rest):
        encoded.extend(todo)
        return real(teacher, todo, *rest)

    monkeypatch.setattr(encode, "_encode", spy)
    before = _files(dataset)
    bar = Bar()
    encode.encode(dataset, checkpoint, bar)
    assert encoded == []
    assert bar.done == pytest.approx(bar.total)
    assert _files(dataset) == before

    folder, output = tmp_path / "music", str(tmp_path / "data")
    folder.mkdir()
    soundfile.write(folder / "a.wav", music(3, 5), SAMPLE_RATE)
    flags = [f"--input={folder}", f"--output={output}", "--crop_seconds=2"]
    assert prepare(*flags, f"--codes={checkpoint}").returncode == 0
    (first,) = stored_tracks(output)
    soundfile.write(folder / "b.wav", music(4, 6), SAMPLE_RATE)
    assert prepare(*flags).returncode == 0
    with pytest.raises(UserError, match="held other tracks"):
        stored_codes.read_info(output, "rvq_vae")
    encode.encode(output, checkpoint, Bar())
    assert set(encoded) == set(stored_tracks(output)) - {first}
    assert stored_codes.read_info(output, "rvq_vae") is not None


def _files(directory: str) -> dict[str, bytes]:
    folder = pathlib.Path(stored_codes.folder(directory, "rvq_vae"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_resumes(dataset, checkpoint, tmp_path, monkeypatch):
    copy = str(tmp_path / "copy")
    shutil.copytree(dataset, copy)
    shutil.rmtree(os.path.join(copy, "codes"))
    real = encode._encode

    def cut(*given):
        yield from itertools.islice(real(*given), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "_encode", cut)
    with pytest.raises(KeyboardInterrupt):
        encode.encode(copy, checkpoint, Bar())
    assert (
        stored_codes.read_info(copy, "rvq_vae") is None
    )  # nothing that training would take for whole
    todo = []
    monkeypatch.setattr(
        encode, "_encode", lambda t, left, *x: (todo.extend(left), real(t, left, *x))[1]
    )
    encode.encode(copy, checkpoint, Bar())
    assert len(todo) == len(SECONDS) - 1
    for split in ("train", "validation"):
        (name,) = stored(copy)["rvq_vae"].shards[split]
        one, two = (
            records.read_shard(os.path.join(stored_codes.folder(d, "rvq_vae"), name))
            for d in (copy, dataset)
        )
        assert one == two


def config_of(dataset: str, **overrides):
    sizes = {"data__dir": dataset, "data__num_samples": 16_000, "teachers": ("rvq_vae", "cqt")}
    return build.check(small.config(**sizes | overrides))


def test_training_takes_stored_codes_without_a_checkpoint(dataset, teacher):
    config = config_of(dataset)
    stored_info = build.find_stored_codes(config)
    run_teachers = build.make_teachers(config, stored_info)
    student = build.make_student(config, run_teachers, stored_info)
    assert student.heads[0] == mert_v1.Head("rvq_vae", 16 + 4, 3)
    objective = build.make_objective(config, student, run_teachers)
    assert objective.context == {}
    codes = np.random.default_rng(0).integers(0, 16, (2, 50, 3)).astype(np.uint16)
    wave = np.zeros((2, 16_000), np.float32)
    teacher_params = {name: t.params for name, t in run_teachers.items()}
    target = step.compute_targets(objective, teacher_params, wave, 49, {"rvq_vae": codes})
    np.testing.assert_array_equal(target["rvq_vae"], codes[:, :49])
    assert target["rvq_vae"].dtype == np.int32


def test_computed_codes_use_the_context_before_the_clip(dataset, checkpoint, teacher):
    """With the context, a crop's codes are nearly those of the track; without, they are not."""
    config = config_of(dataset, teacher__rvq_vae__checkpoint=checkpoint)
    run_teachers = build.make_teachers(config)
    objective = build.make_objective(config, build.make_student(config, run_teachers), run_teachers)
    assert objective.context == {"rvq_vae": 38 * HOP_LENGTH}
    (track, stored_track), *_ = [
        x for x in stored_tracks(dataset).items() if x[1].samples > 20 * SAMPLE_RATE
    ]
    source = records.open_source(dataset, stored_track.split)
    audio = np.concatenate(list(encode.track_audio(source, stored_track)))
    start = 9 * SAMPLE_RATE // HOP_LENGTH * HOP_LENGTH
    wave = audio[None, start - 38 * HOP_LENGTH : start + 16_000].astype(np.float32) / FULL_SCALE
    teacher_params = {name: t.params for name, t in run_teachers.items()}
    target = jax.jit(lambda p, w: step.compute_targets(objective, p, w, 49))(teacher_params, wave)
    expected = whole_tracks(dataset, teacher)[track][start // HOP_LENGTH :][:49]
    assert (target["rvq_vae"][0] == expected).mean() > 0.95
    without_context = jax.jit(teacher.apply)(teacher.params, wave[:, 38 * HOP_LENGTH :])[0, :8]
    assert (without_context == expected[:8]).mean() < 0.9
    clip = wave[:, 38 * HOP_LENGTH :]  # the CQT hears the clip alone
    exact = jax.jit(run_teachers["cqt"].apply)(run_teachers["cqt"].params, clip)[:, :49]
    np.testing.assert_allclose(target["cqt"], exact, atol=1e-6)


def test_codes_of_another_codec_are_refused(dataset, tmp_path):
    encodec_checkpoint.write_encodec(str(tmp_path), params())
    config = config_of(dataset, teacher__rvq_vae__checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="codes of another rvq_vae"):
        build.make_teachers(config, build.find_stored_codes(config))


@pytest.fixture
def another(dataset, tmp_path) -> str:
    """A second dataset, of the same tracks."""
    shutil.copytree(dataset, tmp_path / "another")
    return str(tmp_path / "another")


def rewrite(path: str, **changes) -> None:
    """Change some values of a JSON file."""
    info = json.loads(pathlib.Path(path).read_text())
    pathlib.Path(path).write_text(json.dumps(info | changes))


def test_two_datasets_that_store_the_same_codec_need_no_checkpoint(dataset, another):
    config = config_of(f"{dataset},{another}")
    stored_info = build.find_stored_codes(config)
    assert stored_info["rvq_vae"].codec == stored(dataset)["rvq_vae"].codec
    # what the second one stores is read from its own files
    folder = stored_codes.folder(another, "rvq_vae")
    (shard,) = stored_info["rvq_vae"].shards["train"]
    os.rename(f"{folder}/{shard}", f"{folder}/other")
    rewrite(f"{folder}/codes.json", shards=stored_info["rvq_vae"].shards | {"train": ["other"]})
    sources = build.open_datasets(config, stored_info, "train")
    options = dict(num_samples=HOP_LENGTH * 50, batch_size=8, seed=1, threads=2)
    (batch,) = itertools.islice(pipeline.train_stream(sources, **options), 1)
    assert (batch["record"] >= len(sources[0])).sum() == 4
    assert not batch["looped"].all()
    for row in np.flatnonzero(~batch["looped"]):
        codes = sources[0][int(batch["record"][row]) % len(sources[0])]["codes"]["rvq_vae"]
        first = batch["start"][row] // HOP_LENGTH
        np.testing.assert_array_equal(batch["codes"]["rvq_vae"][row], codes[first : first + 50])


@pytest.mark.parametrize("differs", ["none", "fingerprint", "books", "size"])
def test_codes_that_not_all_datasets_store_are_computed_or_refused(
    dataset, another, checkpoint, capsys, differs
):
    if differs == "none":
        shutil.rmtree(os.path.join(another, "codes"))
    else:
        path = os.path.join(stored_codes.folder(another, "rvq_vae"), stored_codes.INFO)
        rewrite(path, **{differs: "abc" if differs == "fingerprint" else 1})
    # the first one that stores any says which codec it is
    reverse = another if differs == "none" else dataset
    for dirs, odd in (((dataset, another), another), ((another, dataset), reverse)):
        line = f"{odd} does not store the codes of rvq_vae that"
        config = config_of(",".join(dirs))
        with pytest.raises(UserError, match=f"{line}.* --output={odd} --codes=CHECKPOINT"):
            build.find_stored_codes(config)
        config.teacher.rvq_vae.checkpoint = checkpoint
        assert build.find_stored_codes(config) == {}
        assert line in capsys.readouterr().out


def test_clips_must_fit_every_dataset(dataset, another):
    rewrite(os.path.join(another, records.METADATA), overlap_samples=15_000)
    config = config_of(f"{dataset}, {another}")
    with pytest.raises(UserError, match=f"longer than the 15000 that {another} was prepared"):
        build.open_datasets(config, {}, "train")


def test_codes_that_do_not_fit_the_audio_are_refused(dataset, tmp_path):
    copy = str(tmp_path / "copy")
    shutil.copytree(dataset, copy)
    info = stored(copy)["rvq_vae"]
    source = records.open_source(copy, "train")
    for changed, words in (
        (info._replace(hop_length=300), r"bytes for \d+ frames of 3 codes \(\d+ samples"),
        (info._replace(size=3), r"record \d .*: code 1\d of codebooks of 3"),
    ):
        stored_codes.attach(source, "train", {"rvq_vae": changed}, 0.0)
        with pytest.raises(UserError, match=words):
            list(source)
    os.unlink(os.path.join(stored_codes.folder(copy, "rvq_vae"), info.shards["train"][0]))
    with pytest.raises(UserError, match="rvq_vae lacks 1 of its 1 files"):
        stored_codes.attach(source, "train", {"rvq_vae": info}, 0.0)
    with pytest.raises(UserError, match="0 files of codes for 1 of audio in split 'train'"):
        stored_codes.attach(source, "train", {"rvq_vae": info._replace(shards={})}, 0.0)
    path = os.path.join(stored_codes.folder(copy, "rvq_vae"), stored_codes.INFO)
    with open(path, "w") as f:
        json.dump({"teacher": "rvq_vae"}, f)
    with pytest.raises(UserError, match="does not describe codes"):
        stored_codes.read_info(copy, "rvq_vae")


def test_the_command_needs_a_dataset_and_a_codec(tmp_path, dataset):
    for flags, words in (
        ([f"--output={tmp_path / 'none'}", "--codes=x"], "no prepared dataset"),
        ([f"--output={dataset}", f"--codes={tmp_path / 'x.th'}"], "x.th"),
        ([f"--output={dataset}"], "--codes=CHECKPOINT"),
    ):
        done = prepare(*flags)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.splitlines()[-1]

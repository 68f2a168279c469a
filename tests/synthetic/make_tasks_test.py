"""Synthetic datasets: labels, splits, keys, beats, determinism and missing sources."""

import collections
import filecmp
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from mert_jax import make_tasks
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.synthetic import drums, fonts, instruments, melodies, tunes
from mert_jax.synthetic.dataset import SPLITS, NotInstalled, rng
from mert_jax.tasks import marble
from mert_jax.tasks.registry import get_task

ABC = """X:1
T:The Cuckoo -- Reel
M:2/4
L:1/8
K:%s
%s
"""
MAJOR = "GA|GABc|d2d2|cBAB|G2 F2|ABcA|B2G2|D2F2|G4||"
needs_renderer = pytest.mark.skipif(
    importlib.util.find_spec("tinysoundfont") is None, reason=fonts.INSTALL["renderer"]
)


def sine_font(name: str) -> fonts.Font:
    """A font of sines, which needs no renderer."""

    def play(notes, seconds, tuning=0.0):
        wave = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
        for note in notes:
            start, stop = (round(x * SAMPLE_RATE) for x in (note.start, note.stop))
            t = np.arange(max(0, min(stop, len(wave)) - start)) / SAMPLE_RATE
            frequency = 440 * 2 ** ((note.pitch + tuning - 69) / 12)
            tone = note.velocity / 127 * np.sin(2 * np.pi * frequency * t)
            wave[start : start + len(t)] += tone.astype(np.float32)
        return wave

    return fonts.Font(name, play, {"name": name})


PAIR = fonts.Fonts(sine_font("train font"), sine_font("test font"))


@pytest.fixture
def sines(monkeypatch):
    monkeypatch.setattr(fonts, "load_fonts", lambda train, test: PAIR)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """Drum kits of noise."""
    folder, draw = tmp_path_factory.mktemp("kits"), np.random.default_rng(0)
    for kit in (*drums.TEST_KITS, *drums.VAL_KITS, *drums.UNUSED_KITS, "another"):
        (folder / kit).mkdir()
        named = ""
        for name, file in (("Kick 1", "a.wav"), ("Snare", "b.wav"), ("Zap", "c.wav")):
            wave = draw.standard_normal(4800) * np.exp(-np.arange(4800) / 800)
            soundfile.write(folder / kit / file, 0.1 * wave, 48_000)
            layer = f"<layer><filename>{file}</filename></layer>"
            named += f"<instrument><name>{name}</name>{layer}</instrument>"
        if kit == "another":
            named += "<instrument><name>Ride</name><filename>gone.wav</filename></instrument>"
        xml = f"<drumkit_info xmlns='x'><instrumentList>{named}</instrumentList></drumkit_info>"
        (folder / kit / "drumkit.xml").write_text(xml)
    return str(folder)


def assert_same_files(a, b) -> int:
    names = [str(path.relative_to(a)) for path in a.rglob("*") if path.is_file()]
    same, *different = filecmp.cmpfiles(a, b, names, shallow=False)
    assert (len(same), different) == (len(names), [[], []])
    return len(names)


def splits_by(recipe, key: str) -> dict[str, set[str]]:
    splits = collections.defaultdict(set)
    for clip in recipe.clips:
        splits[clip.made_of[key]].add(clip.split)
    return splits


# all datasets


@pytest.mark.parametrize("name", make_tasks.RENDERED)
def test_fonts_belong_to_splits_and_clips_differ(name):
    recipe = make_tasks.RENDERED[name](PAIR, small=True)
    splits = splits_by(recipe, "font")
    assert splits == {"train font": {"train", "val"}, "test font": {"test"}}
    waves = [clip.wave() for clip in recipe.clips[:24]]
    assert len({len(wave) for wave in waves}) == 1
    assert len({wave.tobytes() for wave in waves}) == len(waves)
    peaks = {round(float(np.abs(wave).max()), 3) for wave in waves}
    assert len(peaks) > 0.5 * len(waves)


@pytest.mark.parametrize("name", ["made_pitch", "made_instrument", "made_mix", "made_technique"])
def test_full_size(name):
    recipe = make_tasks.RENDERED[name](PAIR)
    counts = collections.Counter(clip.split for clip in recipe.clips)
    assert 500 <= counts["train"] <= 1200
    assert counts["val"] >= 150
    assert counts["test"] >= 240
    labels = collections.defaultdict(set)
    for clip in recipe.clips:
        labels[clip.split] |= {clip.label} if isinstance(clip.label, str) else set(clip.label)
    assert labels == {split: set(get_task(name).labels) for split in SPLITS}


def test_two_runs_write_the_same_bytes_that_probes_can_read(sines, kits, tmp_path, capsys):
    for run in ("a", "b"):
        assert make_tasks.make_tasks(str(tmp_path / run), small=True, drumkits=kits) == {}
    assert assert_same_files(tmp_path / "a", tmp_path / "b") > 200
    for name in make_tasks.TASKS:
        task = get_task(name)
        clips = task.clips(str(tmp_path / "a" / name))
        counts = json.loads((tmp_path / "a" / name / "about.json").read_text())["counts"]
        assert [len(x) for x in clips.values()] == [x["clips"] for x in counts.values()]
        paths = [clip.path for split in clips.values() for clip in split]
        assert len(set(paths)) == len(paths)
        audio, sample_rate = soundfile.read(paths[0], dtype="int16")
        assert (audio.ndim, sample_rate, len(audio)) == (1, 24_000, task.seconds * 24_000)


def test_an_existing_dataset_is_not_changed(sines, tmp_path, capsys):
    make_tasks.make_tasks(str(tmp_path), ["made_mix"], small=True)
    before = os.stat(tmp_path / "made_mix").st_mtime_ns
    capsys.readouterr()
    make_tasks.make_tasks(str(tmp_path), ["made_mix"], small=True)
    assert capsys.readouterr().out == "made_mix: exists already\n"
    assert os.stat(tmp_path / "made_mix").st_mtime_ns == before
    with pytest.raises(UserError, match=r"was made with .+'small': True"):
        make_tasks.make_tasks(str(tmp_path), ["made_mix"])


# keys


def tune(key: str = "G", melody: str = MAJOR) -> tunes.Tune:
    (header,) = tunes.parse_headers("x", ABC % (key, melody))
    return tunes.parse_tune(header)


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        ("G", (7, "major")),
        ("Bbmaj", (10, "major")),
        ("F# minor", (6, "minor")),
        ("Am", (9, "minor")),
        ("A Minor", (9, "minor")),
        ("EM", (4, "major")),
        ("Ador", None),
        ("D Mixolydian", None),
        ("Hp", None),
        ("G\nM:3/4", None),
        ("G\nK:D", None),
    ],
)
def test_keys_of_abc(key, parsed):
    headers = tunes.parse_headers("x", ABC % (key, MAJOR))
    assert [(x.tonic, x.mode) for x in headers] == ([parsed] if parsed else [])


def test_complete_bars_of_a_tune():
    parsed = tune()
    assert (parsed.bars, parsed.beats, parsed.beat) == (8, 2, 1.0)
    assert parsed.notes[:3] == ((0.0, 0.5, 67), (0.5, 0.5, 69), (1.0, 0.5, 71))
    assert tunes.harmony(parsed)[0] == (7, 11, 2)
    assert tunes.harmony(parsed)[-1] == (7, 11, 2)


def test_a_modal_tune_does_not_agree_with_its_key():
    assert tunes.agrees_with_key(tune())
    assert not tunes.agrees_with_key(tune(melody=MAJOR.replace("F", "=F")))
    assert not tunes.agrees_with_key(tune("D"))


@pytest.mark.parametrize("tonic", range(12))
def test_transpose(tonic):
    before, after = tune(), melodies.transpose(tune(), tonic)
    assert after.header.tonic == tonic
    moved = {new - old for (_, _, new), (_, _, old) in zip(after.notes, before.notes, strict=True)}
    assert len(moved) == 1
    assert (moved.pop() - tonic + 7) % 12 == 0
    assert tunes.agrees_with_key(after)
    assert 60 <= np.median([pitch for *_, pitch in after.notes]) <= 84


def test_each_tune_is_in_one_split_and_keys_are_balanced():
    recipe = melodies.key(PAIR, small=True)
    assert {len(splits) for splits in splits_by(recipe, "tune").values()} == {1}
    assert set(collections.Counter((c.split, c.label) for c in recipe.clips).values()) == {1}
    assert melodies.KEY_LABELS == marble.KEYS


# beats


def test_tempi_drift_and_stay_in_range():
    for i in range(50):
        periods = np.diff(melodies.beat_times(30, rng("test", i)))
        assert (periods > 0).all()
        assert periods.max() / periods.min() < 1.5
        assert np.ptp(periods) > 0.01 * periods.mean()
        assert periods.min() > 60 / 165 * 0.84
        assert periods.max() < 60 / 65 * 1.19


@pytest.mark.parametrize("style", melodies.STYLES)
def test_notes_start_on_the_beats(style):
    parsed, times = tune(), melodies.beat_times(20, rng("test"))

    def clock(at: float) -> float:
        return float(np.interp(at / parsed.beat, np.arange(20), times))

    notes = melodies.play(parsed, (style, 0, 48), 16.0, clock, rng("draw"), drums=True)
    onsets = np.array([note.start for note in notes])
    assert max(np.abs(onsets - time).min() for time in times[:16]) < 0.02


def test_beats_lie_in_the_clip():
    for clip in melodies.beat(PAIR, small=True).clips:
        times = clip.label["beat"]
        assert len(times) >= 8
        assert min(times) > 0
        assert max(times) < melodies.BEAT_SECONDS


# mixes and drums


def test_mixes_have_two_to_four_instruments_equally_often():
    recipe = instruments.mix(PAIR)
    for split in SPLITS:
        sets = [clip.label for clip in recipe.clips if clip.split == split]
        assert {len(names) for names in sets} == {2, 3, 4}
        counts = collections.Counter(name for names in sets for name in names)
        assert counts.keys() == set(instruments.MIX_LABELS)
        assert max(counts.values()) < 1.5 * min(counts.values())


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("c3 - bass drum 1", "kick"),
        ("EE Kick Ring", "kick"),
        ("Snare Roll", None),
        ("Snare Jazz", "snare"),
        ("Ride Bell", "ride"),
        ("Cowbell", "cowbell"),
        ("Sangban1 Bell Mute", "cowbell"),
        ("ride-crash20inch", "ride"),
        ("Crash Left", "crash"),
        ("Hi Hat Opened", "open hat"),
        ("VariBreaks Hat 1 Pd", "closed hat"),
        ("Hi Hat Free", None),
        ("tomhi3", "tom"),
        ("Djembe5 Slap", "hand drum"),
        ("Zap 1", None),
        ("17", None),
    ],
)
def test_labels_of_drums(name, label):
    assert drums.label_of(name) == label


def test_each_kit_is_in_one_split(kits):
    recipe = drums.drums(kits)
    assert {clip.label for clip in recipe.clips} == {"kick", "snare"}
    splits = splits_by(recipe, "kit")
    assert {len(x) for x in splits.values()} == {1}
    assert {kit for kit, x in splits.items() if x == {"test"}} == set(drums.TEST_KITS)
    assert not set(drums.UNUSED_KITS) & splits.keys()
    assert recipe.about["left_out"] == {"another/gone.wav": "no such file"}


# missing sources


def test_a_missing_font_is_named_and_other_datasets_are_made(kits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fonts, "TRAIN_FONT", "/nowhere/x.sf2")
    only = ["made_pitch", "made_drums", "made_mix"]
    missing = make_tasks.make_tasks(str(tmp_path), only, small=True, drumkits=kits)
    assert os.listdir(tmp_path) == ["made_drums"]
    assert make_tasks.report(missing, len(only)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: made_pitch, made_mix not made: no soundfont /nowhere/x.sf2")
    assert "apt-get install fluid-soundfont-gm, or give --train_font=FILE.sf2" in error
    with pytest.raises(UserError, match="made_pitch not made"):
        make_tasks.report({"made_pitch": "no font"}, 1)


def test_missing_packages_are_named_with_their_installation(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(NotInstalled, match="pip install --no-deps tinysoundfont==0"):
        fonts.load_font(str(tmp_path / "x.sf2"))
    tunes.headers.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"pip install 'mert_jax\[make_tasks\]'"):
        tunes.headers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only=made_tea"], "--only: no task made_tea; there are made_pitch"),
        (["--train_font=/nowhere.sf2"], "--train_font=/nowhere.sf2 is not a file"),
        (["--only=made_drums", "--drumkits=/nowhere"], "lacks the drum kits Audiophob"),
        (["--output=gs://x"], "--output=gs://x must be on a local disk"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, options, message):
    command = [sys.executable, "-m", "mert_jax.make_tasks", f"--output={tmp_path}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


# with the renderer


@needs_renderer
def test_a_soundfont_plays_its_pitches_reproducibly(tmp_path):
    font = fonts.load_font(fonts.bundled_font())
    notes = [fonts.Note(0.1, 0.9, pitch, 90, 73) for pitch in (69, 81)]
    waves = [font.play([note], 1.0, tuning=0.5) for note in (*notes, notes[0])]
    np.testing.assert_array_equal(waves[2], waves[0])
    for wave, frequency in zip(waves, (440, 880), strict=False):
        peak = np.abs(np.fft.rfft(wave)).argmax()  # of one second: in Hz
        assert abs(12 * np.log2(peak / frequency) - 0.5) < 0.1
        assert np.abs(wave[: SAMPLE_RATE // 20]).max() < 1e-3
    roles = dict(train_font=fonts.bundled_font(), test_font=fonts.bundled_font())
    for run in ("a", "b"):
        only = ["made_pitch", "made_mix"]
        assert make_tasks.make_tasks(str(tmp_path / run), only, small=True, **roles) == {}
    assert_same_files(tmp_path / "a", tmp_path / "b")


@needs_renderer
def test_a_file_that_is_not_a_soundfont(tmp_path):
    (tmp_path / "x.sf2").write_text("no font")
    with pytest.raises(UserError, match=r"x\.sf2 cannot be read as a soundfont"):
        fonts.load_font(str(tmp_path / "x.sf2"))

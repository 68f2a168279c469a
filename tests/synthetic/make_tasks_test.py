"""Made probe datasets: labels, splits, transposition, beats, determinism, and what is missing."""

import collections
import filecmp
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from mert_jax import make_tasks
from mert_jax.errors import UserError
from mert_jax.synthetic import beats, drums, fonts, keys, mixes, playing, tunes
from mert_jax.synthetic.recipe import SAMPLE_RATE, rng
from mert_jax.tasks import gs
from mert_jax.tasks.registry import get_task

ABC = """X:1
T:The Cuckoo -- Reel
M:2/4
L:1/8
K:%s
%s
"""
MAJOR = "GA|GABc|d2d2|cBAB|G2 F2|ABcA|B2G2|D2F2|G4||"


def sine(name: str) -> fonts.Font:
    """A font of one sine a note, which takes no renderer."""

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


PAIR = fonts.Fonts(sine("trained on"), sine("left out"))


@pytest.fixture
def sines(monkeypatch):
    monkeypatch.setattr(fonts, "pair", lambda train, test: PAIR)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """Drum kits of noise."""
    folder, draw = tmp_path_factory.mktemp("kits"), np.random.default_rng(0)
    for kit in (*drums.TEST_KITS, *drums.VAL_KITS, *drums.NEVER, "another"):
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


# what every task holds to -------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_tasks.RENDERED)
def test_the_test_font_is_heard_in_the_test_alone(name):
    recipe = make_tasks.RENDERED[name](PAIR, small=True)
    found = collections.defaultdict(set)
    for clip in recipe.clips:
        found[clip.split].add(clip.made_of["font"])
    assert found == {"train": {"trained on"}, "val": {"trained on"}, "test": {"left out"}}


@pytest.mark.parametrize("name", make_tasks.RENDERED)
def test_no_two_clips_are_one(name):
    """Nor does a class have clips in train and in test of equal length and loudness."""
    recipe = make_tasks.RENDERED[name](PAIR, small=True)
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
    assert {frozenset(found) for found in labels.values()} == {frozenset(get_task(name).labels)}


def test_two_runs_give_the_same_bytes_and_what_is_there_stays(sines, kits, tmp_path, capsys):
    for run in ("a", "b"):
        assert make_tasks.make_tasks(str(tmp_path / run), small=True, drumkits=kits) == {}
    names = [
        os.path.relpath(os.path.join(folder, file), tmp_path / "a")
        for folder, _, files in os.walk(tmp_path / "a")
        for file in files
    ]
    assert len(names) > 200
    same, *other = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert (len(same), other) == (len(names), [[], []])
    before = os.stat(tmp_path / "a" / "made_mix").st_mtime_ns
    capsys.readouterr()
    make_tasks.make_tasks(str(tmp_path / "a"), ["made_mix"], small=True)
    assert capsys.readouterr().out == "made_mix: there already\n"
    assert os.stat(tmp_path / "a" / "made_mix").st_mtime_ns == before
    with pytest.raises(UserError, match=r"was made with .+'small': True"):
        make_tasks.make_tasks(str(tmp_path / "a"), ["made_mix"])
    # and what is made is what probes read
    for name in make_tasks.TASKS:
        task = get_task(name)
        found = task.clips(str(tmp_path / "a" / name))
        with open(tmp_path / "a" / name / "about.json") as f:
            counts = json.load(f)["counts"]
        assert [len(x) for x in found.values()] == [x["clips"] for x in counts.values()]
        paths = [clip.path for clips in found.values() for clip in clips]
        assert len(set(paths)) == len(paths)
        audio, sample_rate = soundfile.read(paths[0], dtype="int16")
        assert (audio.ndim, sample_rate, len(audio)) == (1, 24_000, task.seconds * 24_000)


# keys ---------------------------------------------------------------------------------------------


def tune(key: str = "G", melody: str = MAJOR) -> tunes.Tune:
    (header,) = tunes.split("x", ABC % (key, melody))
    return tunes.parse(header)


@pytest.mark.parametrize(
    ("key", "found"),
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
def test_keys_of_abc(key, found):
    headers = list(tunes.split("x", ABC % (key, MAJOR)))
    assert [(x.tonic, x.mode) for x in headers] == ([found] if found else [])


def test_whole_bars_of_a_tune():
    found = tune()
    assert (found.bars, found.beats, found.beat) == (8, 2, 1.0)
    assert found.notes[:3] == ((0.0, 0.5, 67), (0.5, 0.5, 69), (1.0, 0.5, 71))
    assert tunes.harmony(found)[0] == (7, 11, 2)
    assert tunes.harmony(found)[-1] == (7, 11, 2)


def test_a_modal_tune_is_not_sure_of_its_key():
    assert tunes.is_sure(tune())
    assert not tunes.is_sure(tune(melody=MAJOR.replace("F", "=F")))
    assert not tunes.is_sure(tune("D"))


@pytest.mark.parametrize("tonic", range(12))
def test_a_tune_is_put_into_a_key(tonic):
    before, after = tune(), keys.in_key(tune(), tonic)
    assert after.header.tonic == tonic
    moved = {new - old for (_, _, new), (_, _, old) in zip(after.notes, before.notes, strict=True)}
    assert len(moved) == 1
    assert (moved.pop() - tonic + 7) % 12 == 0
    assert tunes.is_sure(after)
    assert 60 <= np.median([pitch for *_, pitch in after.notes]) <= 84


def test_no_tune_is_in_two_splits_and_keys_are_balanced():
    recipe = keys.key(PAIR, small=True)
    found = collections.defaultdict(set)
    for clip in recipe.clips:
        found[clip.made_of["tune"]].add(clip.split)
    assert {len(splits) for splits in found.values()} == {1}
    assert set(collections.Counter((c.split, c.label) for c in recipe.clips).values()) == {1}
    assert keys.LABELS == gs.LABELS


# beats --------------------------------------------------------------------------------------------


def test_tempi_drift_and_stay_in_range():
    for i in range(50):
        times = beats.beat_times(30, rng("test", i))
        periods = np.diff(times)
        assert (periods > 0).all()
        assert periods.max() / periods.min() < 1.5
        assert np.ptp(periods) > 0.01 * periods.mean()
        assert periods.min() > 60 / 165 * 0.84
        assert periods.max() < 60 / 65 * 1.19


@pytest.mark.parametrize("style", playing.STYLES)
def test_a_tune_sounds_on_its_beats(style):
    found, times = tune(), beats.beat_times(20, rng("test"))
    clock = lambda at: float(np.interp(at / found.beat, np.arange(20), times))
    notes = playing.play(found, style, 0, 48, 16.0, clock, rng("draw"), drums=True)
    onsets = np.array([note.start for note in notes])
    assert max(np.abs(onsets - time).min() for time in times[:16]) < 0.02


def test_beats_lie_in_the_clip():
    for clip in beats.beat(PAIR, small=True).clips:
        times = clip.label["beat"]
        assert len(times) >= 8
        assert min(times) > 0
        assert max(times) < beats.SECONDS


# mixes and drums ----------------------------------------------------------------------------------


def test_every_instrument_is_in_mixes_of_two_to_four():
    recipe = mixes.mix(PAIR)
    for split in ("train", "val", "test"):
        sets = [clip.label for clip in recipe.clips if clip.split == split]
        assert {len(names) for names in sets} == {2, 3, 4}
        counts = collections.Counter(name for names in sets for name in names)
        assert counts.keys() == set(mixes.LABELS)
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


def test_kits_are_left_out_whole(kits):
    recipe = drums.drums(kits)
    found = collections.defaultdict(set)
    for clip in recipe.clips:
        found[clip.made_of["kit"]].add(clip.split)
        assert clip.label in ("kick", "snare")
    assert {len(splits) for splits in found.values()} == {1}
    assert {kit for kit, splits in found.items() if splits == {"test"}} == set(drums.TEST_KITS)
    assert not set(drums.NEVER) & found.keys()
    assert recipe.about["left_out"] == {"another/gone.wav": "no such file"}


# what is missing ----------------------------------------------------------------------------------


def test_what_is_missing_is_named_and_the_others_are_made(kits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fonts, "TRAIN_FONT", "/nowhere/x.sf2")
    asked = ["made_pitch", "made_drums", "made_mix"]
    missing = make_tasks.make_tasks(str(tmp_path), asked, small=True, drumkits=kits)
    assert os.listdir(tmp_path) == ["made_drums"]
    assert make_tasks.report(missing, len(asked)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: made_pitch, made_mix not made: no soundfont /nowhere/x.sf2")
    assert "apt-get install fluid-soundfont-gm, or give --train_font=FILE.sf2" in said
    with pytest.raises(UserError, match="made_pitch not made"):
        make_tasks.report({"made_pitch": "no font"}, 1)


def test_no_renderer_and_no_tunes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(fonts.Missing, match="pip install --no-deps tinysoundfont==0"):
        fonts.load(str(tmp_path / "x.sf2"))
    tunes.headers.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fonts.Missing, match=r"pip install 'mert_jax\[make_tasks\]'"):
        tunes.headers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only=made_tea"], "--only: no task made_tea; there are made_pitch"),
        (["--train_font=/nowhere.sf2"], "--train_font=/nowhere.sf2 is no file"),
        (["--only=made_drums", "--drumkits=/nowhere"], "lacks the drum kits Audiophob"),
        (["--output=gs://x"], "tasks are made on a local disk"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, options, message):
    command = [sys.executable, "-m", "mert_jax.make_tasks", f"--output={tmp_path}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


# the renderer, where it is installed --------------------------------------------------------------


def test_a_soundfont_sounds_at_its_pitches_and_twice_the_same(tmp_path):
    pytest.importorskip("tinysoundfont", reason=fonts.INSTALL["renderer"])
    font = fonts.load(fonts.bundled())
    notes = [fonts.Note(0.1, 0.9, pitch, 90, 73) for pitch in (69, 81)]
    waves = [font.play([note], 1.0, tuning=0.5) for note in (*notes, notes[0])]
    np.testing.assert_array_equal(waves[2], waves[0])
    for wave, frequency in zip(waves, (440, 880), strict=False):
        peak = np.abs(np.fft.rfft(wave)).argmax()  # of one second: in Hz
        assert abs(12 * np.log2(peak / frequency) - 0.5) < 0.1
        assert np.abs(wave[: SAMPLE_RATE // 20]).max() < 1e-3
    only = ["made_pitch", "made_mix"]
    for run in ("a", "b"):
        roles = dict(train_font=fonts.bundled(), test_font=fonts.bundled())
        assert make_tasks.make_tasks(str(tmp_path / run), only, small=True, **roles) == {}
    for name in only:
        files = [f"audio/{file}" for file in os.listdir(tmp_path / "a" / name / "audio")]
        a, b = (tmp_path / run / name for run in ("a", "b"))
        same, *other = filecmp.cmpfiles(a, b, [*files, "about.json"], shallow=False)
        assert (len(same), other) == (len(files) + 1, [[], []])


def test_a_file_that_is_no_soundfont(tmp_path):
    pytest.importorskip("tinysoundfont", reason=fonts.INSTALL["renderer"])
    (tmp_path / "x.sf2").write_text("no font")
    with pytest.raises(UserError, match=r"x\.sf2 cannot be read as a soundfont"):
        fonts.load(str(tmp_path / "x.sf2"))

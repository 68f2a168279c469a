"""Records that cannot be used: replaced alike everywhere, named once, and too many refused."""

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
from absl import flags

from mert_jax.data import bad_records, loader, pipeline, records, stored_codes
from mert_jax.errors import UserError
from mert_jax.files import read_jsonl
from mert_jax.pretraining import build
from tests import small

HOP, FRAMES, BOOKS, SIZE = 320, 20, 2, 16
SHARDS = (4, 5, 3)
COUNT = sum(SHARDS)
CLIP = dict(num_samples=HOP * 5, batch_size=4, seed=3, threads=2)
KINDS = [
    "flipped",
    "garbage",
    "empty",
    "frames",
    "code",
    "bytes",
    "cut",
    "short",
    "gone",
    "codes gone",
]


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()  # grain's worker processes inherit absl's flags


def write(path: pathlib.Path, changed=None, seed: int = 0) -> str:
    """A dataset of 12 records of random samples, with stored codes, in shards of 4, 5 and 3, and no
    validation split; `changed`: (record, "audio" or "codes") -> bytes that are stored instead."""
    rng, changed = np.random.default_rng(seed), changed or {}
    audio = rng.integers(-32_768, 32_768, (COUNT, HOP * FRAMES), dtype=np.int16)
    stored = rng.integers(0, SIZE, (COUNT, FRAMES, BOOKS)).astype(stored_codes.DTYPE)
    path.mkdir()
    folder = pathlib.Path(stored_codes.folder(str(path), "rvq_vae"))
    folder.mkdir(parents=True)
    first = 0
    for shard, length in enumerate(SHARDS):
        indices = range(first, first + length)
        first += length
        serialised = [records.encode(f"{i}", f"{i}.wav", 0, audio[i]) for i in indices]
        name = records.shard_name("train", shard, len(SHARDS))
        stored_bytes = [
            changed.get((i, "audio"), x) for i, x in zip(indices, serialised, strict=True)
        ]
        records.write_shard(str(path / name), stored_bytes)
        stored_bytes = [changed.get((i, "codes"), stored[i].tobytes()) for i in indices]
        records.write_shard(str(folder / f"train-{shard}"), stored_bytes)
    splits = {"train": {"tracks": COUNT, "records": COUNT, "hours": 0.1}}
    about = dict(chunk_samples=1, overlap_samples=HOP * FRAMES, fingerprint=f"{seed}" * 32)
    records.write_info(str(path), {"train": (list(SHARDS), 1)}, about | {"splits": splits})
    info = stored_codes.CodesInfo(
        "rvq_vae", BOOKS, SIZE, HOP, "codec", about["fingerprint"], {}, {}
    )
    shards = {"train": [f"train-{shard}" for shard in range(len(SHARDS))]}
    (folder / stored_codes.INFO).write_text(json.dumps(info._replace(shards=shards)._asdict()))
    return str(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> str:
    """A dataset of which every record can be used."""
    return write(tmp_path_factory.mktemp("sound") / "data")


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> str:
    """Another one, of other samples."""
    return write(tmp_path_factory.mktemp("second") / "data", seed=1)


def shard_of(record: int) -> tuple[int, int]:
    """The shard of a record, and its index in it."""
    for shard, length in enumerate(SHARDS):
        if record < length:
            return shard, record
        record -= length
    raise IndexError(record)


def damage(kind: str, record: int, path: pathlib.Path) -> tuple[str, set[int], str]:
    """A dataset with a fault of `kind` in `record` or its file, the records that cannot be used,
    and what is to be said of it."""
    empty = records.encode("x", "x.wav", 0, np.zeros(0, np.int16))
    shard, within = shard_of(record)
    first = record - within
    instead = {
        "garbage": ("audio", b"garbage", "its bytes are not a record"),
        "empty": ("audio", empty, "it has no audio"),
        "frames": ("codes", bytes(2 * BOOKS * 19), "76 bytes for 20 frames of 2 codes (6400 "),
        "code": ("codes", b"\x10\0" * BOOKS * FRAMES, "code 16 of codebooks of 16"),
        "bytes": ("codes", bytes(7), "7 bytes for 20 frames of 2 codes (6400 "),
    }
    if kind in instead:
        of, content, words = instead[kind]
        return write(path, {(record, of): content}), {record}, words
    directory = write(path)
    audio_file = path / records.shard_name("train", shard, len(SHARDS))
    codes_file = pathlib.Path(stored_codes.folder(directory, "rvq_vae")) / f"train-{shard}"
    if kind == "flipped":
        held = bytearray(audio_file.read_bytes())
        serialised = records.open_source(directory, "train")[record]["audio"].tobytes()
        at = held.find(serialised[5_000:5_064])
        assert at > 0
        held[at] ^= 1
        audio_file.write_bytes(held)
        return directory, {record}, "hash mismatch"
    if kind == "cut":
        os.truncate(audio_file, audio_file.stat().st_size - 1)
        words = "Riegeli"
    elif kind == "short":
        held = records.Shards(directory, [audio_file.name], [SHARDS[shard]])
        records.write_shard(str(audio_file), [held[i] for i in range(SHARDS[shard] - 1)])
        words = f"the file holds {SHARDS[shard] - 1} records and not {SHARDS[shard]}"
    else:
        (audio_file if kind == "gone" else codes_file).unlink()
        words = "No such file or directory"
    return directory, set(range(first, first + SHARDS[shard])), words


def opened(directory: str, most: float = 1.0):
    source = records.open_source(directory, "train", most)
    stored = {"rvq_vae": stored_codes.read_info(directory, "rvq_vae")}
    stored_codes.attach(source, "train", stored, most)
    return source


def batches(number: int, directories, **options):
    stream = pipeline.train_stream([opened(d) for d in directories], **CLIP | options)
    return list(itertools.islice(stream, number))


def rows(batches_):
    """The clips of batches, one after the other."""
    return [
        jax.tree.map(lambda x, i=i: x[i], batch)
        for batch in batches_
        for i in range(len(batch["record"]))
    ]


def check(before, after, bad: set[int], items) -> int:
    """How many clips `after` has of other records than `before`: those of `bad` ones, cut at the
    same place from the next that can be used, and nothing else differs."""
    replaced = 0
    for a, b in zip(rows(before), rows(after), strict=True):
        record = int(a["record"])
        if record not in bad:
            jax.tree.map(np.testing.assert_array_equal, a, b)
            assert b["faulty"] == -1
            continue
        first = record // COUNT * COUNT
        after_it = (first + (record - first + k) % COUNT for k in range(COUNT))
        stand_in = next(r for r in after_it if r not in bad)
        assert (b["faulty"], b["record"], b["start"]) == (record, stand_in, a["start"])
        start, frame = int(b["start"]), int(b["start"]) // HOP
        np.testing.assert_array_equal(b["audio"], items[stand_in]["audio"][start:][: HOP * 5])
        expected = items[stand_in]["codes"]["rvq_vae"][frame : frame + 5]
        np.testing.assert_array_equal(b["codes"]["rvq_vae"], expected)
        replaced += 1
    return replaced


@pytest.fixture(scope="module")
def undamaged(sound):
    """Batches of the sound dataset, and its records."""
    return batches(6, [sound]), list(opened(sound))


@pytest.mark.parametrize("record", [5, 8, 11], ids=["middle", "end of a shard", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_replaced_by_the_next_record_and_named(kind, record, tmp_path, undamaged):
    directory, bad, words = damage(kind, record, tmp_path / "data")
    source = opened(directory)
    stream = pipeline.train_stream([source], **CLIP)
    assert check(undamaged[0], itertools.islice(stream, 6), bad, undamaged[1]) == 2 * len(bad)
    bad_record = bad_records.diagnose(source, record)
    assert words in bad_record["what"]
    of_codes = kind in ("frames", "code", "bytes", "codes gone")
    shard, within = shard_of(record)
    name = f"train-{shard}" if of_codes else records.shard_name("train", shard, len(SHARDS))
    assert list(bad_record.values())[:3] == [directory, name, within]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, second) -> tuple[str, str, set[int]]:
    """Two datasets with several faults, two in a row and across a shard's end, and their ids."""
    tmp_path = tmp_path_factory.mktemp("damaged")
    one, bad, _ = damage("cut", 6, tmp_path / "one")
    shutil.copytree(second, tmp_path / "two")
    two = tmp_path / "two"
    for shard, name in ((0, "audio"), (2, "codes")):
        length = SHARDS[shard]
        if name == "audio":
            path = two / records.shard_name("train", shard, len(SHARDS))
            source = records.open_source(second, "train")
            content = [records.encode(f"{i}", "x", 0, source[i]["audio"]) for i in range(length)]
            content[1] = content[3] = b"\xff"
        else:
            path = pathlib.Path(stored_codes.folder(str(two), "rvq_vae")) / f"train-{shard}"
            content = list(opened(second).codes["rvq_vae"])[-length:]
            content[2] = b""
        records.write_shard(str(path), content)
    return one, str(two), bad | {COUNT + 1, COUNT + 3, COUNT + 11}


def test_bad_records_of_two_datasets_are_told_apart(damaged, sound, second):
    *directories, bad = damaged
    before, after = batches(12, [sound, second]), batches(12, directories)
    assert check(before, after, bad, [*opened(sound), *opened(second)]) == 2 * len(bad)
    assert {int(x) for batch in after for x in batch["faulty"]} == bad | {-1}


@pytest.mark.parametrize(
    "options",
    [dict(threads=0), dict(threads=4), dict(workers=1), dict(rows=[0, 1]), dict(rows=[1, 3])],
    ids=str,
)
def test_hosts_threads_and_processes_change_nothing(damaged, options):
    *directories, _ = damaged
    number = 2 if "workers" in options else 8
    rows = np.array(options.get("rows", range(4)))
    expected = [jax.tree.map(lambda x: x[rows], batch) for batch in batches(number, directories)]
    actual = batches(number, directories, **options)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_later_start_changes_nothing(damaged):
    *directories, _ = damaged
    later = batches(4, directories, start=4)
    jax.tree.map(np.testing.assert_array_equal, later, batches(8, directories)[4:])


def test_validation_replaces_them_too(damaged):
    one, _, bad = damaged
    options = {key: CLIP[key] for key in ("num_samples", "batch_size")}
    validation = list(pipeline.validation_batches(opened(one), **options))
    faulty = np.concatenate([batch["faulty"] for batch in validation])
    assert set(faulty[faulty >= 0].tolist()) == {record for record in bad if record < COUNT}


@pytest.mark.parametrize("threads", [0, 4])
def test_a_stream_without_usable_records_raises(tmp_path, threads):
    directory = write(tmp_path / "data")
    source = records.open_source(directory, "train")
    for name in source.names:
        os.truncate(os.path.join(directory, name), 100)
    stream = pipeline.train_stream([source], **CLIP | {"threads": threads})
    with pytest.raises(UserError, match=r"none of the records .* can be used; .* at least 64KB"):
        next(stream)


def test_the_search_for_a_usable_record_ends(tmp_path, monkeypatch):
    directory, *_ = damage("garbage", 2, tmp_path / "data")
    monkeypatch.setattr(pipeline, "MAX_TRIES", 1)
    with pytest.raises(UserError, match="records 2 to 2 can be used; first error: record 2 of mu"):
        pipeline.next_usable(opened(directory), 2)
    assert pipeline.next_usable(opened(directory), 3)[0] == 3
    lost, *_ = damage("cut", 4, tmp_path / "lost")  # a whole file is passed over at once
    monkeypatch.setattr(pipeline, "MAX_TRIES", 2)
    assert pipeline.next_usable(opened(lost), 4)[0] == 9


def test_missing_files_are_refused_beyond_the_share(sound, tmp_path):
    directory, bad, _ = damage("gone", 5, tmp_path / "data")
    share = len(bad) / COUNT
    assert len(records.open_source(directory, "train", share)) == COUNT
    for most in (0.0, share - 0.01):
        with pytest.raises(UserError, match=r"lacks 1 of its 3 files with 41\.7% of the rec"):
            records.open_source(directory, "train", most)
    for path in pathlib.Path(directory).glob("*.array_record-*"):
        path.unlink()
    with pytest.raises(UserError, match="lacks 3 of its 3 files with 100"):
        records.open_source(directory, "train", 1.0)
    shutil.copytree(sound, tmp_path / "copy")
    folder = pathlib.Path(stored_codes.folder(str(tmp_path / "copy"), "rvq_vae"))
    (folder / "train-0").unlink()
    assert len(opened(str(tmp_path / "copy"), 0.5)) == COUNT
    with pytest.raises(UserError, match=r"rvq_vae lacks 1 of its 3 files with 33\.3%"):
        opened(str(tmp_path / "copy"), 0.1)


def test_a_config_says_how_many_may_be_missing(sound, tmp_path):
    directory, *_ = damage("gone", 5, tmp_path / "data")
    config = small.config(data__dir=directory, data__num_samples=HOP * 5, data__max_faulty=0.5)
    stored = {"rvq_vae": stored_codes.read_info(directory, "rvq_vae")}
    assert len(*build.open_datasets(config, stored, "train")) == COUNT
    config.data.max_faulty = 0.01
    with pytest.raises(UserError, match="lacks 1 of its 3"):
        build.open_datasets(config, stored, "train")
    for share in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"data.max_faulty is {share}"):
            build.check(small.config(data__max_faulty=share))


def test_files_are_opened_again_after_others_were(sound, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN_FILES", 1)
    source = records.open_source(sound, "train")
    for i in (0, 11, 5, 0, 5, 11):
        assert source[i]["track"] == f"{i}"
    assert source._reader.cache_info().currsize == 1


def test_a_file_that_was_put_right_is_read(sound, tmp_path):
    """What a reader of the file holds from before must not count."""
    directory, *_ = damage("flipped", 5, tmp_path / "data")
    source = records.open_source(directory, "train")
    with pytest.raises(records.BadRecordError):
        source[5]
    name = source.names[1]
    os.replace(shutil.copy(os.path.join(sound, name), tmp_path), os.path.join(directory, name))
    assert source[5]["track"] == "5"
    bad_record = bad_records.diagnose(source, 5)
    assert (bad_record["shard"], bad_record["index"]) == (name, 1)
    assert bad_record["what"] == "it could not be read, and now it can"


def test_too_many_open_files_are_not_a_bad_record(sound):
    code = (
        "import resource; from mert_jax.data import records; "
        f"source = records.open_source({sound!r}, 'train'); source[0]; files = []; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "try:\n  while True: files.append(open('/dev/null'))\n"
        "except OSError: pass\n"
        "try: source[5]\n"
        "except records.BadRecordError: raise\n"
        "except ValueError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Too many open files" in done.stdout
    assert "ulimit -n" in done.stdout


def count(workdir, directories, stream, **options) -> bad_records.BadRecords:
    """Count the batches of `stream`, from batch `start` on, as the training loop does."""
    sources = [opened(directory) for directory in directories]
    counter = bad_records.BadRecords(workdir, sources, **dict(max_fraction=1.0) | options)
    for batch, clips in enumerate(stream, options.get("start", 0)):
        counter.note(batch + 1, batch, clips["faulty"])
    counter.close()
    return counter


def files(workdir: pathlib.Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in workdir.iterdir()}


def test_each_bad_record_is_written_and_printed_once(damaged, tmp_path, capsys):
    one, two, bad = damaged
    stream = batches(18, [one, two])
    counter = count(str(tmp_path), [one, two], stream)
    written = read_jsonl(str(tmp_path / bad_records.FILE))
    assert sorted(row["record"] for row in written) == sorted(bad)
    assert counter.replaced == 3 * len(bad)
    for row in written:
        batch_index = next(
            k for k, batch in enumerate(stream) if row["record"] in batch["faulty"].tolist()
        )
        dataset, record = divmod(row["record"], COUNT)
        assert (row["batch"], row["step"], row["dataset"]) == (
            batch_index,
            batch_index + 1,
            (one, two)[dataset],
        )
        shard, within = shard_of(record)
        of_codes = (dataset, record) == (1, 11)
        name = f"train-{shard}" if of_codes else records.shard_name("train", shard, len(SHARDS))
        assert (row["shard"], row["index"]) == (name, within)
        assert ("Riegeli", "0 bytes" if of_codes else "not a record")[dataset] in row["what"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bad)
    assert f"step {written[0]['step']}: record {written[0]['record']} cannot be used" in lines[0]


@pytest.mark.parametrize(("stop", "restored"), [(7, 7), (9, 4), (18, 13), (5, 0)])
def test_a_resumed_run_has_the_files_of_one_that_was_not_stopped(
    damaged, tmp_path, capsys, stop, restored
):
    """Whatever was noted after the checkpoint, and a line that a crash cut off."""
    *directories, _ = damaged
    stream = batches(18, directories)
    unbroken, parts = tmp_path / "unbroken", tmp_path / "parts"
    unbroken.mkdir()
    parts.mkdir()
    expected = count(str(unbroken), directories, stream)
    count(str(parts), directories, stream[:stop])
    for path in parts.iterdir():
        path.write_text(path.read_text() + '{"step": 1, "ba')
    options = dict(start=restored)
    another = count(str(parts), directories, stream[restored:], writes=False, **options)
    resumed = count(str(parts), directories, stream[restored:], **options)
    assert files(parts) == files(unbroken)
    assert set(files(unbroken)) == set(NAMES)
    for counter in (resumed, another):
        assert (counter.replaced, counter._drawn) == (expected.replaced, expected._drawn)
    assert expected._drawn == 72


NAMES = (bad_records.FILE, bad_records.COUNTS)


def test_a_batch_that_comes_again_is_not_counted_again(damaged, tmp_path):
    """After going back, batches that were read ahead come again, and steps have earlier numbers."""
    *directories, _ = damaged
    stream = batches(8, directories)
    counter = bad_records.BadRecords(str(tmp_path), [opened(d) for d in directories], 1.0)
    for batch in (0, 1, 2, 3, 4, 5, 4, 5, 6, 7):
        counter.note(batch, batch, stream[batch]["faulty"])
    assert counter._drawn == 32
    assert counter.replaced == sum((batch["faulty"] >= 0).sum() for batch in stream)


def clips(faulty: int, count: int) -> np.ndarray:
    return np.array([5] * faulty + [-1] * (count - faulty))


def test_too_many_replaced_clips_stop_the_run(tmp_path):
    directory, *_ = damage("garbage", 5, tmp_path / "data")

    def fresh(**options) -> bad_records.BadRecords:
        return bad_records.BadRecords(None, [opened(directory)], **options)

    counter = fresh()
    for batch in range(9):
        counter.note(batch + 1, batch, clips(3, 100))
    words = (
        r"30 of 1000 clips .* 3\.00% and more than 1\.00%: .*00001-of-00003, record 1 \(its bytes "
        r"are not a record .*\)\. Copy .* mert_jax\.prepare.* data\.max_faulty"
    )
    with pytest.raises(UserError, match=words):
        counter.note(10, 9, clips(3, 100))
    counter = fresh(max_fraction=0.03)
    for batch in range(10):
        counter.note(batch + 1, batch, clips(3, 100))
    with pytest.raises(UserError, match="31 of 1001"):
        counter.note(11, 10, clips(1, 1))
    fresh().note(1, 0, clips(1, 1))
    fresh(max_fraction=1.0).note(1, 0, clips(2000, 2000))


def test_the_share_is_that_of_the_whole_run(tmp_path):
    directory, *_ = damage("garbage", 5, tmp_path / "data")
    workdir = str(tmp_path)
    counter = bad_records.BadRecords(workdir, [opened(directory)])
    counter.note(1, 0, clips(9, 250))
    counter.note(2, 1, clips(0, 250))
    counter.close()
    resumed = bad_records.BadRecords(workdir, [opened(directory)], start=2)
    resumed.note(3, 2, clips(0, 250))
    with pytest.raises(
        UserError, match=r"11 of 1000 clips.* record 1 \(its bytes are not a record"
    ):
        resumed.note(4, 3, clips(2, 250))


def test_counting_closes_the_stream(damaged):
    *directories, _ = damaged
    counter = bad_records.BadRecords(None, [opened(directory) for directory in directories], 1.0)
    source = [opened(directory) for directory in directories]
    stream = bad_records.count_bad_records(
        pipeline.train_stream(source, **CLIP, start=3), counter, 3
    )
    counted = list(itertools.islice(stream, 4))
    assert counter.replaced == sum((batch["faulty"] >= 0).sum() for batch in counted) > 0
    stream.close()


MANY = """
import itertools, pathlib, sys
from mert_jax.data import pipeline, records
source = records.open_source(sys.argv[1], "train")
stream = pipeline.train_stream([source], num_samples=320, batch_size=8, seed=0, threads=2)
ids = [int(x) for batch in itertools.islice(stream, 8) for x in batch["record"]]
assert len(set(ids)) == 64 and max(ids) > 5_000_000 and len(source) == 10_000_000, ids
# the peak of this process: getrusage's begins with that of the one that started it
status = pathlib.Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_ten_million_records_open_in_little_memory(tmp_path):
    """2,000 shards of 5,000, which are one file by many names."""
    record = records.encode("x", "x.wav", 0, np.ones(320, np.int16))
    names = [records.shard_name("train", shard, 2_000) for shard in range(2_000)]
    records.write_shard(str(tmp_path / names[0]), [record] * 5_000)
    for name in names[1:]:
        os.link(tmp_path / names[0], tmp_path / name)
    splits = {"train": {"tracks": 1, "records": 10_000_000, "hours": 1.0}}
    about = {"chunk_samples": 1, "fingerprint": "f", "splits": splits}
    records.write_info(str(tmp_path), {"train": ([5_000] * 2_000, 1)}, about)
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300


def summary(name: str, fingerprint: str) -> dict[str, str]:
    return {"dataset": name, "fingerprint": fingerprint * 16}


A, B, C = summary("a", "ab"), summary("b", "cd"), summary("c", "ef")


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([A], [C], r"are c \(fingerprint efefefef\), but the run began with a \(.* abababab\)\."),
        ([A], [A, B], r"are a .*, b \(fingerprint cdcdcdcd\), but the run began with a .*\."),
        ([A, B], [B, A], r"are b .*, a .*, but the run began with a .*, b .*\."),
    ],
    ids=["changed", "added", "reordered"],
)
def test_other_datasets_are_refused_unless_accepted(before, now, words, capsys):
    with pytest.raises(UserError, match=words) as error:
        loader.check_unchanged(before, now, accept=False)
    assert "--config.data.accept_changes=True" in str(error.value)
    loader.check_unchanged(before, now, accept=True)
    assert "accepted" in capsys.readouterr().out


def test_a_dataset_that_was_moved_or_is_not_known_has_not_changed(capsys):
    loader.check_unchanged([], [A, B], accept=False)
    loader.check_unchanged([A, B], [A | {"dataset": "elsewhere", "hours": 1.0}, B], accept=False)
    assert not capsys.readouterr().out

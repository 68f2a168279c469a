"""Records: the cut into chunks, and a dataset that TFDS opens without TensorFlow."""

import concurrent.futures
import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from mert_jax.constants import HOP_LENGTH
from mert_jax.data import records
from mert_jax.errors import UserError

CHUNK, OVERLAP = 720_000, 122_880


@given(
    st.integers(1, 5_000_000),
    st.sampled_from([(CHUNK, OVERLAP), (320 * 20, 320 * 7), (320 * 3, 320 * 2)]),
)
def test_every_crop_lies_in_some_chunk(samples, sizes):
    chunk, overlap = sizes
    samples = min(samples, 40 * chunk)
    spans = records.chunk_spans(samples, chunk, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == samples
    for start, stop in spans:
        assert start % HOP_LENGTH == 0
        assert stop > start
    for (a, b), (c, d) in itertools.pairwise(spans):
        assert b - c == overlap
        assert a < c
        assert b < d
    # the first crop that a chunk no longer holds whole is held by the next
    for (start, stop), following in zip(spans, [*spans[1:], None], strict=True):
        last = (stop - overlap) // HOP_LENGTH * HOP_LENGTH
        first_outside = max(start, last + HOP_LENGTH)
        if following is None:
            assert first_outside + overlap > samples or len(spans) == 1
        else:
            assert following[0] <= first_outside


def test_every_crop_by_brute_force():
    chunk, overlap = 3_200, 960
    for samples in range(1, 12_000, 77):
        spans = records.chunk_spans(samples, chunk, overlap)
        for start in range(0, max(1, samples - overlap + 1), HOP_LENGTH):
            stop = min(start + overlap, samples)
            assert any(a <= start and stop <= b for a, b in spans), (samples, start)


def test_chunks_are_about_the_size_asked_for():
    stride = CHUNK - OVERLAP
    for samples in range(CHUNK, 8_000_000, 12_345):
        lengths = [b - a for a, b in records.chunk_spans(samples, CHUNK, OVERLAP)]
        assert set(lengths[:-1]) <= {CHUNK}
        assert OVERLAP + stride / 2 <= lengths[-1] <= CHUNK + stride / 2


def metadata(**splits):
    about = {name: {"tracks": 1, "records": n, "hours": 0.1} for name, n in splits.items()}
    return {"chunk_samples": 1, "fingerprint": "f00d", "splits": about}


@pytest.fixture
def dataset(tmp_path):
    """Five records in two train shards, none in validation."""
    rng = np.random.default_rng(0)
    audio = [rng.integers(-32_768, 32_768, 1_000 + i, dtype=np.int16) for i in range(5)]
    serialised = [
        records.encode(f"{i:016x}", f"a/é{i}.wav", 320 * i, x) for i, x in enumerate(audio)
    ]
    names = [records.shard_name("train", shard, 2) for shard in range(2)]
    sizes = [
        records.write_shard(str(tmp_path / names[0]), serialised[:3]),
        records.write_shard(str(tmp_path / names[1]), serialised[3:]),
    ]
    splits = {"train": ([3, 2], sum(sizes))}
    records.write_info(str(tmp_path), splits, metadata(train=5, validation=0))
    return tmp_path, audio


def check(source, audio):
    assert len(source) == 5
    for i, expected in enumerate(audio):
        item = source[i]
        assert set(item) == {"track", "path", "offset", "audio", "codes"}
        assert (item["track"], item["path"], item["offset"]) == (
            f"{i:016x}",
            f"a/é{i}.wav",
            320 * i,
        )
        assert item["audio"].dtype == np.int16
        np.testing.assert_array_equal(item["audio"], expected)


def test_records_come_back(dataset):
    directory, audio = dataset
    check(records.open_source(str(directory), "train"), audio)


def test_tfds_opens_it(dataset):
    directory, audio = dataset
    source = tfds.builder_from_directory(directory).as_data_source("train")
    assert len(source) == 5
    np.testing.assert_array_equal(source[4]["audio"], audio[4])
    assert source[4]["audio"].dtype == np.int16
    assert source[4]["path"].decode() == "a/é4.wav"
    assert source[4]["offset"] == 320 * 4


def test_reading_needs_no_tensorflow_and_no_jax(dataset):
    code = (
        "import sys; from mert_jax.data import records; "
        f"print(len(records.open_source({str(dataset[0])!r}, 'train')[0]['audio'])); "
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1000"


def test_a_source_is_pickled_small_and_read_by_threads_and_processes(dataset):
    directory, audio = dataset
    source = records.open_source(str(directory), "train")
    source[0]
    assert len(pickle.dumps(source)) < 1_000
    check(pickle.loads(pickle.dumps(source)), audio)
    order = [i % 5 for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for i, item in zip(order, threads.map(source.__getitem__, order), strict=True):
            np.testing.assert_array_equal(item["audio"], audio[i])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(source.__getitem__, (3,))["audio"], audio[3])


def test_a_record_costs_two_bytes_a_sample():
    audio = np.zeros(720_000, np.int16)
    assert len(records.encode("0" * 16, "a/b/c.wav", 0, audio)) - 2 * len(audio) < 200


def test_equal_records_have_equal_bytes():
    code = (
        "import numpy as np, hashlib; from mert_jax.data import records; "
        "r = records.encode('a', 'b', 3, np.arange(9, dtype=np.int16)); "
        "print(hashlib.sha256(r).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(3)
    ]
    assert len(set(runs)) == 1


def test_a_directory_without_a_dataset(tmp_path):
    with pytest.raises(UserError, match=r"no prepared dataset in .*mert_jax\.prepare"):
        records.open_source(str(tmp_path), "train")
    with pytest.raises(UserError, match="no prepared dataset"):
        records.metadata(str(tmp_path / "nowhere"))
    (tmp_path / ".staging").mkdir()
    with pytest.raises(UserError, match="not finished"):
        records.metadata(str(tmp_path))


def test_other_tfds_datasets_are_refused(dataset):
    directory, _ = dataset
    (directory / "metadata.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="is not a dataset of mert_jax"):
        records.open_source(str(directory), "train")
    (directory / "metadata.json").unlink()
    with pytest.raises(UserError, match="is not a dataset of mert_jax"):
        records.metadata(str(directory))


def test_a_split_that_is_not_there(dataset):
    directory, _ = dataset
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=f"no records in split '{split}'.*train"):
            records.open_source(str(directory), split)


def test_a_shard_that_is_not_there(dataset):
    directory, _ = dataset
    (directory / records.shard_name("train", 1, 2)).unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 files"):
        records.open_source(str(directory), "train")

"""The stream: global batch k depends on (seed, k) only, and every crop is what it says."""

import itertools
import math

import jax
import numpy as np
import pytest
from absl import flags

from mert_jax.data import pipeline
from mert_jax.errors import UserError
from mert_jax.pretraining import build
from tests import small

HOP = 320


class Source:
    """Records whose samples name the record, counted from `first`, and the position: record * 1000
    + sample // HOP."""

    def __init__(self, lengths, first=0):
        self._lengths, self._first = lengths, first

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, index):
        frames = np.arange(self._lengths[index]) // HOP
        samples = (self._first + index) * 1000 + frames
        return {"audio": samples.astype(np.int16), "codes": {}}


SOURCE = Source([HOP * (20 + i) + 7 for i in range(12)])
MORE = Source([HOP * (30 + 3 * i) for i in range(5)], first=12)
MIX = dict(sources=[SOURCE, MORE], weights=(0.7, 0.3))
CLIP = dict(num_samples=HOP * 5)


def batches(number, sources=(SOURCE,), **options):
    options = dict(batch_size=4, seed=3, threads=2) | CLIP | options
    return list(itertools.islice(pipeline.train_stream(sources, **options), number))


def column(name, stream):
    return np.concatenate([batch[name] for batch in stream])


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_one_dataset_gives_the_clips_it_always_gave():
    first, late = batches(1)[0], batches(1, start=10**6)[0]
    assert first["record"].tolist() == [4, 6, 9, 7]
    assert (first["start"] // HOP).tolist() == [3, 4, 19, 11]
    assert late["record"].tolist() == [8, 6, 1, 9]
    assert (late["start"] // HOP).tolist() == [12, 7, 13, 9]


@pytest.mark.parametrize("sources", [[SOURCE], [SOURCE, MORE]])
def test_crops_match_their_records(sources):
    records = [item for source in sources for item in map(source.__getitem__, range(len(source)))]
    for batch in batches(6, sources):
        assert batch["audio"].dtype == np.int16
        assert batch["audio"].shape == (4, HOP * 5)
        for audio, record, start in zip(
            batch["audio"], batch["record"], batch["start"], strict=True
        ):
            assert start % HOP == 0
            np.testing.assert_array_equal(audio, records[record]["audio"][start:][: HOP * 5])


def test_every_start_is_drawn_the_last_one_included():
    source = Source([HOP * 8 + 5])
    starts = np.concatenate([b["start"] for b in batches(40, [source])])
    assert set(starts // HOP) == {0, 1, 2, 3}


def test_an_epoch_has_each_record_once_then_another_order_and_other_crops():
    first, second = batches(3), batches(6)[3:]
    records = [np.concatenate([b["record"] for b in epoch]) for epoch in (first, second)]
    assert sorted(records[0]) == sorted(records[1]) == list(range(12))
    assert list(records[0]) != list(records[1])
    starts = [
        dict(zip(records[i], np.concatenate([b["start"] for b in epoch]), strict=True))
        for i, epoch in enumerate((first, second))
    ]
    assert sum(starts[0][r] != starts[1][r] for r in range(12)) > 6


def test_another_seed_gives_other_batches():
    assert not same(batches(1)[0], batches(1, seed=4)[0])


@pytest.mark.parametrize("of", [{}, MIX], ids=["one", "mix"])
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_make_up_the_same_global_batch(num_hosts, of):
    global_batches = batches(5, **of)
    # devices of a host need not be neighbours on the mesh
    for share in (np.arange(4).reshape(num_hosts, -1), np.arange(4).reshape(-1, num_hosts).T):
        parts = [batches(5, rows=rows, **of) for rows in share]
        for k, batch in enumerate(global_batches):
            for rows, part in zip(share, parts, strict=True):
                own = jax.tree.map(lambda x, rows=rows: x[rows], batch)
                jax.tree.map(np.testing.assert_array_equal, part[k], own)


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()  # grain's worker processes inherit absl's flags


@pytest.mark.parametrize("options", [dict(threads=0), dict(threads=8), dict(workers=2)])
def test_threads_and_workers_change_nothing(options):
    assert all(map(same, batches(5, **MIX), batches(5, **MIX, **options)))


@pytest.mark.parametrize("of", [{}, MIX], ids=["one", "mix"])
@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_starting_later_gives_the_later_batches(start, of):
    assert all(map(same, batches(start + 2, **of)[start:], batches(2, start=start, **of)))
    halves = [batches(2, start=start, rows=rows, **of) for rows in ([0, 1], [2, 3])]
    together = np.concatenate([half[0]["audio"] for half in halves])
    np.testing.assert_array_equal(together, batches(start + 1, **of)[start]["audio"])


def test_a_mix_has_the_clips_of_its_datasets_in_their_order():
    """At once and after millions of clips, which nobody has to draw first."""
    for k in (0, 10**6):
        clips = batches(5, **MIX, start=k)
        records, starts = column("record", clips), column("start", clips)
        for i, (first, source) in enumerate([(0, SOURCE), (12, MORE)]):
            here = (records >= first) & (records < first + len(source))
            assert here.sum() == (14, 6)[i]
            before = 4 * k * (7, 3)[i] // 10
            alone = batches(here.sum(), [source], batch_size=1, seed=3 + i, start=before)
            np.testing.assert_array_equal(records[here] - first, column("record", alone))
            np.testing.assert_array_equal(starts[here], column("start", alone))


@pytest.mark.parametrize(
    "weights", [(0.8, 0.2), (0.7, 0.3), (1009, 1000), (1 / 3, 2 / 3), (0.6, 0.25, 0.15), (1, 1e-9)]
)
@pytest.mark.parametrize("start", [0, 2**47])
def test_any_number_of_clips_has_the_shares_of_the_weights(weights, start):
    shares = pipeline.shares(weights)
    clips = [pipeline.clip_of_mix(k, shares) for k in range(start, start + 5000)]
    dataset, before = np.array(clips).T
    for i, weight in enumerate(weights):
        # each clip of a dataset comes once, in order
        indices = before[dataset == i]
        np.testing.assert_array_equal(np.diff(indices), 1)
        expected = np.arange(5000) * (weight / sum(weights))
        drawn = np.cumsum(dataset == i) - (dataset == i)
        assert np.abs(drawn - expected).max() < len(weights)
        if len(indices) and start:
            assert indices[0] == pytest.approx(start * weight / sum(weights), abs=len(weights))


def test_shares_are_the_weights_as_written():
    assert pipeline.shares((0.8, 0.2)) == pipeline.shares((4, 1)) == [4, 1]
    assert pipeline.shares((1, 0.3)) == [10, 3]


def test_without_weights_every_record_comes_equally_often():
    records = column("record", batches(51, [SOURCE, MORE], batch_size=1))
    for epoch in range(3):
        assert sorted(records[17 * epoch :][:17]) == list(range(17))


def test_every_epoch_of_a_dataset_in_a_mix_has_each_record_once_in_another_order():
    records = column("record", batches(30, **MIX))
    for first, count in ((0, 12), (12, 5)):
        own = records[(records >= first) & (records < first + count)]
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert len(epochs) > 5
        assert (np.sort(epochs) == np.arange(first, first + count)).all()
        assert len(set(map(tuple, epochs))) > len(epochs) / 2


def test_datasets_of_the_same_size_are_shuffled_and_cropped_each_in_its_own_way():
    lengths = [HOP * 200] * 40
    clips = batches(20, [Source(lengths), Source(lengths)])
    records, starts = column("record", clips), column("start", clips)
    a, b = (np.flatnonzero(records // 40 == i) for i in (0, 1))
    assert len(a) == len(b) == 40
    assert (records[a] == records[b] % 40).mean() < 0.2
    assert (starts[a] == starts[b]).mean() < 0.2


@pytest.mark.parametrize(
    "weights",
    [(1,), (1, 1, 1), (1, 0), (1, -0.5), (1, math.nan), (1, math.inf), (1, "a"), (1, True)],
)
def test_weights_must_be_a_positive_number_for_each_dataset(weights):
    config = small.config(data__dir="mine, general", data__weights=weights)
    with pytest.raises(UserError, match=rf"are {len(weights)} \(1.* for 2 datasets .*'mine, gen"):
        build.check(config)
    build.check(small.config(data__dir="mine,general", data__weights=(4, 1.5)))


def test_short_records_are_looped_and_marked():
    source = Source([HOP * 2 + 3, HOP * 9])
    batch = batches(1, [source], batch_size=2)[0]
    for audio, record, looped in zip(batch["audio"], batch["record"], batch["looped"], strict=True):
        assert looped == (record == 0)
        if looped:
            np.testing.assert_array_equal(audio, np.resize(source[0]["audio"], HOP * 5))


def test_validation_sees_every_record_and_is_the_same_each_time():
    one, two = (list(pipeline.validation_batches(SOURCE, batch_size=8, **CLIP)) for _ in range(2))
    assert all(map(same, one, two))
    records = np.concatenate([b["record"] for b in one])
    assert list(records) == [*range(12), 0, 1, 2, 3]
    halves = [
        list(pipeline.validation_batches(SOURCE, batch_size=8, rows=rows, **CLIP))
        for rows in (range(4), range(4, 8))
    ]
    for k, batch in enumerate(one):
        together = np.concatenate([half[k]["audio"] for half in halves])
        np.testing.assert_array_equal(together, batch["audio"])


def test_prefetch_keeps_order_and_runs_ahead():
    put = []
    stream = pipeline.prefetch((x for x in range(5)), lambda x: put.append(x) or x, depth=2)
    assert next(stream) == 0
    assert put == [0, 1, 2]
    assert list(stream) == [1, 2, 3, 4]


class WithCodes(Source):
    """Codes that name the record and the frame."""

    def __getitem__(self, index):
        frames = np.arange(-(-self._lengths[index] // HOP))
        codes = np.stack([np.full_like(frames, index), frames], -1).astype(np.uint16)
        return super().__getitem__(index) | {"codes": {"name": codes}}


def test_codes_are_cut_with_the_audio():
    lengths = [HOP * (20 + i) + 7 for i in range(11)] + [HOP * 2 + 100]
    looped = 0
    for batch in batches(6, [WithCodes(lengths)]):
        codes = batch["codes"]["name"]
        assert codes.shape == (4, 5, 2)
        for row in range(4):
            record, first = batch["record"][row], batch["start"][row] // HOP
            assert (codes[row, :, 0] == record).all()
            if batch["looped"][row]:  # 2.3 hops, again and again
                looped += 1
                assert codes[row, :, 1].tolist() == [0, 1, 2, 0, 1]
            else:
                assert codes[row, :, 1].tolist() == list(range(first, first + 5))
    assert looped


def test_context_is_what_came_before_or_silence():
    plain, more = batches(6), batches(6, context=HOP * 3)
    silent = 0
    for a, b in zip(plain, more, strict=True):
        assert b["audio"].shape == (4, HOP * 8)
        np.testing.assert_array_equal(b["audio"][:, HOP * 3 :], a["audio"])
        for audio, record, start in zip(b["audio"], b["record"], b["start"], strict=True):
            before = min(start, HOP * 3)
            expected = SOURCE[record]["audio"][start - before : start]
            np.testing.assert_array_equal(audio[HOP * 3 - before : HOP * 3], expected)
            assert not audio[: HOP * 3 - before].any()
            silent += before == 0
    assert silent

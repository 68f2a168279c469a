"""The prepared dataset: its records, its TFDS metadata, and opening it for training.

A record is a chunk of a track: `track` (hash of the content), `path`, `offset` (samples into the
track) and `audio` (int16 [n], 24 kHz mono, wave = audio / 32768).

Raw int16 and not FLAC, as measured on music (`python -m tests.benchmarks.stream FILES`): a random
5 s crop is read 1175 against 379 times a second a core, for 1.63 times the bytes on disk.
Reading through TFDS costs no more than reading the bytes alone.
"""

import bisect
import collections
import errno
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath
from google.protobuf.message import DecodeError

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.errors import UserError

# tensorflow_datasets is imported where it is used: decoding workers import this module too, and
# have no need of it.

NAME = "music"
VERSION = "1.0.0"
INFO = "dataset_info.json"
METADATA = "metadata.json"
# group_size:1 lets random access read one record; PCM hardly compresses, and zstd costs two thirds
# of the reading speed.
WRITER_OPTIONS = "group_size:1,uncompressed"
OPEN = 256  # files a split is read from at once: each has a descriptor and 8 bytes a record
# what array_record says when it is this process that lacks something, and not the file
LIMITS = tuple(os.strerror(number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))
# what protobuf and tfds raise for bytes that are something else
NO_RECORD = (DecodeError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)


class Fault(UserError):
    """A record that cannot be used: `what` is wrong, in which file `shard` and at which `index` of
    it; the same is wrong up to, not including, record `beyond` of the split."""

    def __init__(self, what: str, shard: str, index: int, beyond: int):
        super().__init__(what, shard, index, beyond)
        self.what, self.shard, self.index, self.beyond = what, shard, index, beyond

    def __str__(self) -> str:
        return f"record {self.index} of {self.shard} cannot be used: {self.what}"


def chunk_spans(samples: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a track into spans (start, stop) of about `chunk` samples, neighbours sharing `overlap`.

    Starts are multiples of `chunk - overlap`; a last span that would bring less than half of that
    is merged into the one before it. Every stretch of up to `overlap` samples that starts on a
    multiple of the hop lies wholly in some span.
    """
    stride = chunk - overlap
    count = max(1, (samples - overlap + stride // 2) // stride)
    starts = [k * stride for k in range(count)]
    return [(s, s + chunk) for s in starts[:-1]] + [(starts[-1], samples)]


def encode(track: str, path: str, offset: int, audio: np.ndarray) -> bytes:
    """Serialise one record; `audio` is int16 [n]. The same record always gives the same bytes."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def of_bytes(value: bytes) -> tf_feature_pb2.Feature:
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))

    features = {
        "track": of_bytes(track.encode()),
        "path": of_bytes(path.encode()),
        "offset": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[offset])),
        "audio": of_bytes(np.ascontiguousarray(audio, "<i2").tobytes()),
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    # a protobuf map has no order of its own: without this, equal datasets differ in their bytes
    return example.SerializeToString(deterministic=True)


def shard_name(split: str, shard: int, shards: int) -> str:
    """The file name TFDS gives a shard."""
    return f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Write serialised records as one ArrayRecord file and return their bytes.

    Raises OSError where the disk does not take them.
    """
    size = 0
    try:
        writer = array_record_module.ArrayRecordWriter(path, WRITER_OPTIONS)
        for record in records:
            writer.write(record)
            size += len(record)
        writer.close()
    except RuntimeError as e:  # array_record's word for a full disk, among others
        raise OSError(errno.EIO, str(e)) from e
    return size


class Split(NamedTuple):
    """The shards of one split: records in each, and bytes in all."""

    shard_lengths: list[int]
    num_bytes: int


def write_info(directory: str, splits: Mapping[str, Split], metadata: Mapping[str, Any]) -> None:
    """Write the TFDS description of a dataset (features, splits, metadata) into its directory."""
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME,
        version=tfds.core.Version(VERSION),
        data_dir=str(directory),
        module_name="mert_jax.records",
    )
    features = tfds.features.FeaturesDict(
        {
            "track": tfds.features.Text(),
            "path": tfds.features.Text(),
            "offset": tfds.features.Scalar(dtype=np.int64),
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
        }
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Music, decoded to mono 24 kHz int16, in overlapping chunks.",
        features=features,
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(metadata),
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory), dataset_name=NAME, filetype_suffix="array_record"
    )
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=name,
                    shard_lengths=split.shard_lengths,
                    num_bytes=split.num_bytes,
                    filename_template=template.replace(split=name),
                )
                for name, split in splits.items()
            ]
        )
    )
    info.write_to_directory(directory)


def fingerprint(tracks: Iterable[tuple[str, int]], settings: Mapping[str, Any]) -> str:
    """Name a dataset by its content: hash of the sorted (track, samples) and of the settings."""
    content = json.dumps([sorted(tracks), settings], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def metadata(directory: str) -> dict[str, Any]:
    """Read what training needs to know of a prepared dataset.

    Keys: sample_rate, hop_length, chunk_samples, overlap_samples, splits (hours, records and tracks
    of each), short_tracks (tracks shorter than the overlap), fingerprint, settings. Raises
    `UserError` where the directory holds no finished dataset of ours.
    """
    root = epath.Path(directory)
    if not (root / INFO).exists():
        if (root / ".staging").exists():
            raise UserError(
                f"the preparation of {directory} is not finished; run the same "
                "python -m mert_jax.prepare command again to go on"
            )
        raise UserError(
            f"no prepared dataset in {directory} (no {INFO} there); make one with "
            f"python -m mert_jax.prepare --input=MUSIC --output={directory}"
        )
    try:
        found = json.loads((root / METADATA).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{directory} is no dataset of mert_jax.prepare: {METADATA}: {e}") from e
    if not isinstance(found, dict) or "chunk_samples" not in found:
        raise UserError(
            f"{directory} is a TFDS dataset, but not of mert_jax.prepare ({METADATA} has no "
            "chunk_samples); prepare one with python -m mert_jax.prepare"
        )
    return found


class Shards:
    """Random access to the serialised records of ArrayRecord files, of which file i in `directory`
    holds `lengths[i]`: thread-safe, and each file is opened when it is first read.

    Raises Fault for what cannot be read, and UserError where this process may open no more files.
    """

    def __init__(self, directory: str, names: Sequence[str], lengths: Sequence[int]):
        self._directory, self._names = str(directory), list(names)
        self._ends = list(itertools.accumulate(lengths, initial=0))
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """The file of a record, and its index in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index) - 1
        return shard, index - self._ends[shard]

    def fault(self, index: int, what: str, all_of_it: bool = False) -> Fault:
        """What is wrong with a record, or with the whole file it lies in."""
        shard, within = self._locate(index)
        beyond = self._ends[shard + 1] if all_of_it else index + 1
        return Fault(what, self._names[shard], within, beyond)

    def __getitem__(self, index: int) -> bytes:
        shard, within = self._locate(index)
        try:
            return self._read(shard, within, index)
        except Fault:
            # a file that was replaced, or a moment's fault of the network, is not the record's
            with self._lock:
                self._readers.pop(shard, None)
            return self._read(shard, within, index)

    def _read(self, shard: int, within: int, index: int) -> bytes:
        with self._lock:
            reader = self._readers.get(shard)
            if reader:
                self._readers.move_to_end(shard)
        # outside of the lock: it may take long, and two threads may do it for one file
        reader = reader or self._open(shard, index)
        try:
            return reader.read([within])[0]
        except RuntimeError as e:
            raise self.fault(index, _said(e)) from e

    def _open(self, shard: int, index: int) -> Any:
        path = os.path.join(self._directory, self._names[shard])
        reader = _reader(path)
        held, expected = reader.num_records(), self._ends[shard + 1] - self._ends[shard]
        if held != expected:
            what = f"the file holds {held} records and not {expected}"
            if not reader.ok():
                try:  # to learn why
                    reader.read([0])
                except RuntimeError as e:
                    what = _said(e)
            raise self.fault(index, what, all_of_it=True)
        with self._lock:
            self._readers[shard] = reader
            while len(self._readers) > OPEN:
                self._readers.popitem(last=False)
        return reader


def _reader(path: str) -> Any:
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=32_768
    )


def _said(error: RuntimeError) -> str:
    """array_record's words; UserError where they are about this process."""
    said = " ".join(str(error).split())
    if any(limit in said for limit in LIMITS):
        raise UserError(f"{said}; raise the limit (ulimit -n), or lower data.threads") from error
    return said


def count(path: str) -> int:
    """The records of an ArrayRecord file; UserError where it cannot be read."""
    reader = _reader(path)
    try:
        if not reader.ok():
            reader.read([0])
    except RuntimeError as e:
        raise UserError(f"{path} cannot be read: {_said(e)}") from e
    return reader.num_records()


def missing(
    directory: str, names: Sequence[str], lengths: Sequence[int], most: float
) -> tuple[list[str], float]:
    """Which files of `names` the directory lacks and the share of the `lengths` in them, if that is
    more than `most` or everything; else [] and 0."""
    present = {path.name for path in epath.Path(directory).iterdir()}
    lost = {name: n for name, n in zip(names, lengths, strict=True) if name not in present}
    share = sum(lost.values()) / max(sum(lengths), 1)
    return (list(lost), share) if lost and (share > most or share == 1) else ([], 0.0)


class RecordSource:
    """Random access to the records of one split: thread-safe, and cheap to pickle for workers.

    An item is a dict: track (str), path (str), offset (int) and audio (int16 [n], read-only; it
    cannot hold NaN). Raises Fault for a record that cannot be read or has no audio.
    """

    def __init__(self, directory: str, split: str):
        self.directory = str(directory)
        self._split = split
        self._fingerprint = metadata(directory)["fingerprint"]

    @functools.cached_property
    def _info(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.directory).info

    @functools.cached_property
    def _shards(self) -> Shards:
        return Shards(self.directory, self.shards(), self.shard_lengths())

    def shards(self) -> list[str]:
        """The file names of the shards."""
        count = len(self.shard_lengths())
        return [shard_name(self._split, shard, count) for shard in range(count)]

    def shard_lengths(self) -> list[int]:
        """How many records each shard holds."""
        return list(self._info.splits[self._split].shard_lengths)

    def fault(self, index: int, what: str) -> Fault:
        """What is wrong with a record."""
        return self._shards.fault(index, what)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        serialised = self._shards[index]
        try:
            record = self._info.features.deserialize_example_np(serialised)
            record |= {"track": record["track"].decode(), "path": record["path"].decode()}
        except NO_RECORD as e:
            raise self.fault(index, f"its bytes are no record ({e!r})") from e
        if not len(record["audio"]):
            raise self.fault(index, "it has no audio")
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_info", "_shards")}

    def __repr__(self) -> str:
        return f"Source(split={self._split!r}, fingerprint={self._fingerprint!r})"


def open_source(directory: str, split: str, max_missing: float = 0.0) -> RecordSource:
    """Open a split of a prepared dataset for reading records by index.

    Raises `UserError` where the directory holds no finished dataset, the split is not in it, or
    shards with more than the share `max_missing` of its records, or all of them, are missing.
    """
    splits = metadata(directory)["splits"]
    if not splits.get(split, {}).get("records"):
        held = ", ".join(f"{name} ({v['tracks']} tracks)" for name, v in splits.items())
        raise UserError(
            f"{directory} has no records in split {split!r}; it holds {held}. Prepare more tracks, "
            "or set --validation_fraction"
        )
    source = RecordSource(directory, split)
    names = source.shards()
    lost, share = missing(directory, names, source.shard_lengths(), max_missing)
    if lost:
        raise UserError(
            f"{directory} lacks {len(lost)} of its {len(names)} {split} shards with {share:.1%} of "
            f"the records, {lost[0]} first; copy the dataset again, or remove it and prepare it "
            "anew"
        )
    return source


assert SAMPLE_RATE % HOP_LENGTH == 0

"""Records of a prepared dataset, its TFDS metadata, and random access to it.

A record is a chunk of a track: `track` (hash of the content), `path`, `offset` (samples into the
track) and `audio` (int16 [N], 24 kHz mono, wave = audio / 32768). Audio is raw int16 instead of
FLAC: a core reads 1175 random 5 s crops a second instead of 379, for 1.63 times the bytes on disk
(`python -m tests.benchmarks.stream FILES`).
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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath
from google.protobuf.message import DecodeError

from mert_jax.errors import UserError

# tensorflow_datasets is slow to import and imported where it is used: decoding workers, which
# import this module, do not need it.

NAME = "music"
VERSION = "1.0.0"
INFO = "dataset_info.json"
METADATA = "metadata.json"
# group_size:1 reads single records; PCM hardly compresses, and zstd costs 2/3 of the reading speed
WRITER_OPTIONS = "group_size:1,uncompressed"
MAX_OPEN_FILES = 256  # of a split: each takes a descriptor and 8 bytes a record
# array_record's messages if this process has reached a limit and the file is not at fault
_LIMIT_MESSAGES = tuple(
    os.strerror(number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)
# exceptions of protobuf and tfds for bytes that are not a record
_PARSE_ERRORS = (DecodeError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)


class BadRecordError(UserError):
    """A record cannot be used: the reason, its file `shard`, and its `index` in that file.

    The reason holds for all records of the split up to `next_index` (exclusive).
    """

    def __init__(self, reason: str, shard: str, index: int, next_index: int):
        super().__init__(reason, shard, index, next_index)
        self.reason, self.shard, self.index, self.next_index = reason, shard, index, next_index

    def __str__(self) -> str:
        return f"record {self.index} of {self.shard} cannot be used: {self.reason}"


def chunk_spans(samples: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a track into spans (start, stop) of about `chunk` samples, neighbours sharing `overlap`.

    Starts are multiples of `chunk - overlap`; a last span that would add less than half of that is
    merged into the one before it. Any `overlap` samples from a multiple of the hop lie in one span.
    """
    stride = chunk - overlap
    count = max(1, (samples - overlap + stride // 2) // stride)
    starts = [k * stride for k in range(count)]
    return [(s, s + chunk) for s in starts[:-1]] + [(starts[-1], samples)]


def encode(track: str, path: str, offset: int, audio: np.ndarray) -> bytes:
    """Serialise a record with `audio` int16 [N]; equal records give equal bytes."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def bytes_feature(value: bytes) -> tf_feature_pb2.Feature:
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))

    features = {
        "track": bytes_feature(track.encode()),
        "path": bytes_feature(path.encode()),
        "offset": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[offset])),
        "audio": bytes_feature(np.ascontiguousarray(audio, "<i2").tobytes()),
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    # a protobuf map has no order: without this, the bytes of equal datasets would differ
    return example.SerializeToString(deterministic=True)


def shard_name(split: str, shard: int, shards: int) -> str:
    """Return the file name that TFDS gives a shard."""
    return f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Write serialised records as an ArrayRecord file and return their size in bytes.

    Raises OSError if the file cannot be written.
    """
    size = 0
    try:
        writer = array_record_module.ArrayRecordWriter(path, WRITER_OPTIONS)
        for record in records:
            writer.write(record)
            size += len(record)
        writer.close()
    except RuntimeError as e:  # e.g. a full disk
        raise OSError(errno.EIO, str(e)) from e
    return size


class Split(NamedTuple):
    """The number of records in each shard of a split, and the bytes of all."""

    shard_lengths: list[int]
    num_bytes: int


def write_info(directory: str, splits: Mapping[str, Split], metadata: Mapping[str, Any]) -> None:
    """Write the TFDS description of a dataset (features, splits, metadata) to its directory."""
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
    split_infos = [
        tfds.core.SplitInfo(
            name=name, filename_template=template.replace(split=name), **split._asdict()
        )
        for name, split in splits.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(split_infos))
    info.write_to_directory(directory)


def fingerprint(tracks: Iterable[tuple[str, int]], settings: Mapping[str, Any]) -> str:
    """Return a hash of the (track, samples) of a dataset, in any order, and of its settings."""
    content = json.dumps([sorted(tracks), settings], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def metadata(directory: str) -> dict[str, Any]:
    """Read the metadata of a prepared dataset.

    Keys: sample_rate, hop_length, chunk_samples, overlap_samples, splits (hours, records and tracks
    of each), short_tracks (tracks shorter than the overlap), fingerprint, settings. Raises
    UserError if the directory has no finished dataset of `prepare`.
    """
    root = epath.Path(directory)
    if not (root / INFO).exists():
        if (root / ".staging").exists():
            raise UserError(
                f"the preparation of {directory} is not finished; run the same "
                "python -m mert_jax.prepare command again to finish it"
            )
        raise UserError(
            f"no prepared dataset in {directory} (no {INFO} there); make one with "
            f"python -m mert_jax.prepare --input=MUSIC --output={directory}"
        )
    try:
        values = json.loads((root / METADATA).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{directory} is not of mert_jax.prepare: {METADATA}: {e}") from e
    if not isinstance(values, dict) or "chunk_samples" not in values:
        raise UserError(
            f"{directory} is a TFDS dataset, but not of mert_jax.prepare ({METADATA} has no "
            "chunk_samples); prepare one with python -m mert_jax.prepare"
        )
    return values


class Shards:
    """Thread-safe random access to the serialised records of ArrayRecord files.

    File i of `names` has `lengths[i]` records and is opened when it is first read. Raises
    BadRecordError for a record that cannot be read, UserError if no more files can be opened.
    """

    def __init__(self, directory: str, names: Sequence[str], lengths: Sequence[int]):
        self._args = str(directory), list(names), list(lengths)
        self._directory, self._names, _ = self._args
        self._ends = list(itertools.accumulate(lengths, initial=0))
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Shards, self._args

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the file of a record, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index) - 1
        return shard, index - self._ends[shard]

    def error(self, index: int, reason: str, whole_file: bool = False) -> BadRecordError:
        """Return an error about a record, or about all records of its file."""
        shard, within = self._locate(index)
        next_index = self._ends[shard + 1] if whole_file else index + 1
        return BadRecordError(reason, self._names[shard], within, next_index)

    def __getitem__(self, index: int) -> bytes:
        shard, within = self._locate(index)
        try:
            return self._read(shard, within, index)
        except BadRecordError:
            # the file may have been replaced, or the network have failed briefly: open it again
            with self._lock:
                self._readers.pop(shard, None)
            return self._read(shard, within, index)

    def _read(self, shard: int, within: int, index: int) -> bytes:
        with self._lock:
            reader = self._readers.get(shard)
            if reader:
                self._readers.move_to_end(shard)
        # opening is slow and not locked; if two threads open the same file, no harm is done
        reader = reader or self._open(shard, index)
        try:
            return reader.read([within])[0]
        except RuntimeError as e:
            raise self.error(index, _message(e)) from e

    def _open(self, shard: int, index: int) -> Any:
        reader = _reader(os.path.join(self._directory, self._names[shard]))
        length, expected = reader.num_records(), self._ends[shard + 1] - self._ends[shard]
        if length != expected:
            reason = _open_error(reader) or f"the file holds {length} records and not {expected}"
            raise self.error(index, reason, whole_file=True)
        with self._lock:
            self._readers[shard] = reader
            while len(self._readers) > MAX_OPEN_FILES:
                self._readers.popitem(last=False)
        return reader


def _reader(path: str) -> Any:
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=32_768
    )


def _open_error(reader: Any) -> str:
    """Return the reason why a file could not be opened, "" if it could."""
    if not reader.ok():
        try:
            reader.read([0])  # the reader gives the reason only here
        except RuntimeError as e:
            return _message(e)
    return ""


def _message(error: RuntimeError) -> str:
    """Return array_record's message. Raises UserError if it is about a limit of this process."""
    message = " ".join(str(error).split())
    if any(limit in message for limit in _LIMIT_MESSAGES):
        raise UserError(f"{message}; raise the limit (ulimit -n), or lower data.threads") from error
    return message


def count_records(path: str) -> int:
    """Return the number of records of an ArrayRecord file. Raises UserError if it is unreadable."""
    reader = _reader(path)
    if reason := _open_error(reader):
        raise UserError(f"{path} cannot be read: {reason}")
    return reader.num_records()


def missing_files(
    directory: str, names: Sequence[str], lengths: Sequence[int], max_fraction: float
) -> tuple[list[str], float]:
    """Return the files that `directory` lacks, and the fraction of all records in them.

    [] and 0 if that is at most `max_fraction` and not everything.
    """
    present = {path.name for path in epath.Path(directory).iterdir()}
    missing = {name: n for name, n in zip(names, lengths, strict=True) if name not in present}
    fraction = sum(missing.values()) / max(sum(lengths), 1)
    if missing and (fraction > max_fraction or fraction == 1):
        return list(missing), fraction
    return [], 0.0


class RecordSource:
    """Thread-safe random access to the records of a split, cheap to pickle for workers.

    An item has track (str), path (str), offset (int) and audio (int16 [N], read-only). Raises
    BadRecordError for a record that cannot be read or has no audio.
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
        return Shards(self.directory, self.shard_names(), self.shard_lengths())

    def shard_names(self) -> list[str]:
        """Return the file names of the shards."""
        count = len(self.shard_lengths())
        return [shard_name(self._split, shard, count) for shard in range(count)]

    def shard_lengths(self) -> list[int]:
        """Return the number of records in each shard."""
        return list(self._info.splits[self._split].shard_lengths)

    def error(self, index: int, reason: str) -> BadRecordError:
        """Return an error about a record."""
        return self._shards.error(index, reason)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        serialised = self._shards[index]
        try:
            record = self._info.features.deserialize_example_np(serialised)
            record |= {"track": record["track"].decode(), "path": record["path"].decode()}
        except _PARSE_ERRORS as e:
            raise self.error(index, f"its bytes are not a record ({e!r})") from e
        if not len(record["audio"]):
            raise self.error(index, "it has no audio")
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_info", "_shards")}

    def __repr__(self) -> str:  # grain names a pipeline by its source
        return f"Source(split={self._split!r}, fingerprint={self._fingerprint!r})"


def open_source(directory: str, split: str, max_missing: float = 0.0) -> RecordSource:
    """Open a split of a prepared dataset for reading records by index.

    Raises UserError if the directory has no finished dataset, the split has no records, or shards
    with all or more than the fraction `max_missing` of its records are missing.
    """
    splits = metadata(directory)["splits"]
    if not splits.get(split, {}).get("records"):
        tracks = ", ".join(f"{name} ({v['tracks']} tracks)" for name, v in splits.items())
        raise UserError(
            f"{directory} has no records in split {split!r}; it has {tracks}. Prepare more tracks, "
            "or set --validation_fraction"
        )
    source = RecordSource(directory, split)
    names = source.shard_names()
    missing, fraction = missing_files(directory, names, source.shard_lengths(), max_missing)
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of its {len(names)} {split} shards with "
            f"{fraction:.1%} of the records, {missing[0]} first; copy the dataset again, or remove "
            "it and prepare it again"
        )
    return source

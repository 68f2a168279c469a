"""Records of a prepared dataset, its TFDS metadata, and random access to it.

A record is a chunk of a track: `track` (hash of the content), `path`, `offset` (samples into the
track) and `audio` (int16 [N], 24 kHz mono, wave = audio / 32768), which is raw instead of FLAC: a
core reads 3 times as many crops, from 1.63 times the bytes (`python -m tests.benchmarks.stream`).
"""

import bisect
import contextlib
import errno
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from google.protobuf.message import DecodeError

from mert_jax.errors import UserError

# tensorflow_datasets is slow to import and imported where it is used: decoding does not need it

NAME = "music"
INFO = "dataset_info.json"
METADATA = "metadata.json"
# group_size:1 reads single records; PCM hardly compresses, and zstd costs 2/3 of the reading speed
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = dict(options="readahead_buffer_size:0", file_reader_buffer_size=32_768)
MAX_OPEN_FILES = 256  # of a split: each takes a descriptor and 8 bytes a record
LOCAL = ("_reader", "_example")  # not pickled
# array_record's messages if this process has reached a limit and the file is not at fault
_LIMITS = tuple(os.strerror(number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class BadRecordError(UserError):
    """Record `index` of the file `shard` is unusable, as are the next ones up to `next_index`."""

    def __init__(self, reason: str, shard: str, index: int, next_index: int):
        super().__init__(reason, shard, index, next_index)
        self.reason, self.shard, self.index, self.next_index = reason, shard, index, next_index

    def __str__(self) -> str:
        return f"record {self.index} of {self.shard} cannot be used: {self.reason}"


def chunk_spans(samples: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a track into spans (start, stop) of about `chunk` samples, neighbours sharing `overlap`.

    A last span that would add less than half a stride is merged into the one before it.
    """
    stride = chunk - overlap
    last = max(0, (samples - overlap + stride // 2) // stride - 1) * stride
    return [(start, start + chunk) for start in range(0, last, stride)] + [(last, samples)]


def encode(track: str, path: str, offset: int, audio: np.ndarray) -> bytes:
    """Serialise a record with `audio` int16 [N]; equal records give equal bytes."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["track"].bytes_list.value.append(track.encode())
    feature["path"].bytes_list.value.append(path.encode())
    feature["offset"].int64_list.value.append(offset)
    feature["audio"].bytes_list.value.append(np.ascontiguousarray(audio, "<i2").tobytes())
    # a protobuf map has no order: without this, the bytes of equal datasets would differ
    return example.SerializeToString(deterministic=True)


def shard_name(split: str, shard: int, shards: int) -> str:
    """Return the file name that TFDS gives a shard."""
    return f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Write an ArrayRecord file and return the bytes of its records. Raises OSError on failure."""
    size = 0
    try:
        writer = ArrayRecordWriter(path, WRITER_OPTIONS)
        for record in records:
            writer.write(record)
            size += len(record)
        writer.close()
    except RuntimeError as e:  # e.g. a full disk
        raise OSError(errno.EIO, str(e)) from e
    return size


def read_shard(path: str) -> list[bytes]:
    """Return the records of an ArrayRecord file. Raises UserError if it cannot be read."""
    try:
        return ArrayRecordReader(path, **READER_OPTIONS).read_all()
    except RuntimeError as e:
        raise UserError(f"{path} cannot be read: {_message(e)}") from e


def _message(error: RuntimeError) -> str:
    """Return array_record's message. Raises UserError if it is about a limit of this process."""
    message = " ".join(str(error).split())
    if any(limit in message for limit in _LIMITS):
        raise UserError(f"{message}; raise the limit (ulimit -n), or lower data.threads") from error
    return message


def write_info(
    directory: str, splits: Mapping[str, tuple[list[int], int]], metadata: Mapping[str, Any]
) -> None:
    """Write the TFDS description; `splits` has the records of each shard, and the bytes of all."""
    import tensorflow_datasets as tfds

    version, module = tfds.core.Version("1.0.0"), "mert_jax.records"
    text, offset = tfds.features.Text(), tfds.features.Scalar(dtype=np.int64)
    audio = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")
    features = dict(track=text, path=text, offset=offset, audio=audio)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(NAME, version, str(directory), module),
        description="Music, decoded to mono 24 kHz int16, in overlapping chunks.",
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(metadata),
    )
    info.set_file_format("array_record")
    infos, names = [], dict(dataset_name=NAME, filetype_suffix="array_record")
    for name, split in splits.items():
        files = tfds.core.ShardedFileTemplate(epath.Path(directory), split=name, **names)
        infos.append(tfds.core.SplitInfo(name, *split, filename_template=files))
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(directory)


def metadata(directory: str) -> dict[str, Any]:
    """Read `selection.describe` of a dataset. Raises UserError if `prepare` has not finished it."""
    root, problem = epath.Path(directory), f"no prepared dataset in {directory} (no {INFO} there)"
    try:
        if (root / INFO).exists():
            problem = f"{directory} is not a dataset of mert_jax.prepare"
            values = json.loads((root / METADATA).read_text())
            if "chunk_samples" in values:
                return values
        elif (root / ".staging").exists():
            problem = f"the preparation of {directory} is not finished"
    except (OSError, ValueError, TypeError) as e:
        problem += f" ({e})"
    raise UserError(f"{problem}; run python -m mert_jax.prepare --input=MUSIC --output={directory}")


def _open(path: str, length: int) -> ArrayRecordReader:
    """Open a file of `length` records. Raises RuntimeError if it has another number of them."""
    reader = ArrayRecordReader(path, **READER_OPTIONS)
    if not reader.ok():
        reader.read([0])  # raises the reason
    if (records := reader.num_records()) != length:
        raise RuntimeError(f"the file holds {records} records and not {length}")
    return reader


class Shards:
    """Thread-safe random access to the serialised records of files `names`, with `lengths` records.

    Raises BadRecordError for a record that cannot be read, UserError at a limit of open files.
    """

    def __init__(self, directory: str, names: Sequence[str], lengths: Sequence[int]):
        self.directory, self.names, self.lengths = str(directory), list(names), list(lengths)
        self._ends = list(itertools.accumulate(lengths, initial=0))

    @functools.cached_property
    def _reader(self) -> Callable[[str, int], ArrayRecordReader]:
        return functools.lru_cache(MAX_OPEN_FILES)(_open)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in LOCAL}

    def __len__(self) -> int:
        return self._ends[-1]

    def check_files(self, max_missing: float, way_out: str) -> None:
        """Raise UserError if all records, or more than the fraction `max_missing`, are missing."""
        present = {path.name for path in epath.Path(self.directory).iterdir()}
        missing = [i for i, name in enumerate(self.names) if name not in present]
        fraction = sum(self.lengths[i] for i in missing) / max(len(self), 1)
        if missing and (fraction > max_missing or fraction == 1):
            raise UserError(
                f"{self.directory} lacks {len(missing)} of its {len(self.names)} files with "
                f"{fraction:.1%} of the records, {self.names[missing[0]]} first; {way_out}"
            )

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index) - 1
        return shard, index - self._ends[shard]

    def error(self, index: int, reason: str, whole_file: bool = False) -> BadRecordError:
        """Return an error about a record and, with `whole_file`, the later ones of its file."""
        shard, within = self._locate(index)
        next_index = self._ends[shard + 1] if whole_file else index + 1
        return BadRecordError(reason, self.names[shard], within, next_index)

    def __getitem__(self, index: int) -> Any:
        shard, within = self._locate(index)
        file = os.path.join(self.directory, self.names[shard]), self.lengths[shard]
        with contextlib.suppress(RuntimeError):
            return self._reader(*file).read([within])[0]
        reader = None
        try:  # the file may have been replaced, or the network have failed briefly: open it again
            reader = _open(*file)
            return reader.read([within])[0]
        except RuntimeError as e:
            raise self.error(index, _message(e), whole_file=not reader) from e


class RecordSource(Shards):
    """Random access to records: track (str), path (str), offset (int), audio (int16 [N]) and codes.

    codes: of each teacher that `stored_codes.attach` has added. Raises BadRecordError.
    """

    def __init__(self, *files: Any):
        super().__init__(*files)
        self.__setstate__({"codes": {}})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # not in __getitem__: threads that import tensorflow_datasets at once wait for each other
        from tensorflow_datasets.proto import tf_example_pb2

        self.__dict__ |= state | {"_example": tf_example_pb2.Example}

    def __getitem__(self, index: int) -> dict[str, Any]:
        serialised = super().__getitem__(index)
        try:
            feature = self._example.FromString(serialised).features.feature
            track, path = (feature[key].bytes_list.value[0].decode() for key in ("track", "path"))
            audio = np.frombuffer(feature["audio"].bytes_list.value[0], "<i2")
            offset = feature["offset"].int64_list.value[0]
        except (DecodeError, LookupError, ValueError) as e:
            raise self.error(index, f"its bytes are not a record ({e!r})") from e
        if not len(audio):
            raise self.error(index, "it has no audio")
        codes = {name: each.of_samples(index, len(audio)) for name, each in self.codes.items()}
        return {"track": track, "path": path, "offset": offset, "audio": audio, "codes": codes}


def open_source(directory: str, split: str, max_missing: float = 0.0) -> RecordSource:
    """Open a split. Raises UserError if more than the fraction `max_missing` of it is missing."""
    splits = metadata(directory)["splits"]
    if not splits.get(split, {}).get("records"):
        tracks = ", ".join(f"{name} ({v['tracks']} tracks)" for name, v in splits.items())
        raise UserError(
            f"{directory} has no records in split {split!r}; it has {tracks}. Prepare more tracks, "
            "or set --validation_fraction"
        )
    infos = json.loads((epath.Path(directory) / INFO).read_text())["splits"]
    (lengths,) = (list(map(int, x["shardLengths"])) for x in infos if x["name"] == split)
    names = [shard_name(split, shard, len(lengths)) for shard in range(len(lengths))]
    source = RecordSource(directory, names, lengths)
    source.check_files(max_missing, "copy the dataset again, or remove it and prepare it again")
    return source

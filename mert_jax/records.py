"""The prepared dataset: its records, its TFDS metadata, and opening it for training.

A record is a chunk of a track: `track` (hash of the content), `path`, `offset` (samples into the
track) and `audio` (int16 [n], 24 kHz mono, wave = audio / 32768).

Raw int16 and not FLAC, as measured on music (`python -m tests.benchmarks.stream FILES`): a random
5 s crop is read 1175 against 379 times a second a core, for 1.63 times the bytes on disk.
Reading through TFDS costs no more than reading the bytes alone.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from mert_jax.cli import UserError
from mert_jax.decode import SAMPLE_RATE

# tensorflow_datasets is imported where it is used: decoding workers import this module too, and
# have no need of it.

HOP_LENGTH = 320  # samples between frames: every chunk and every crop starts on a multiple
NAME = "music"
VERSION = "1.0.0"
INFO = "dataset_info.json"
METADATA = "metadata.json"
# group_size:1 lets random access read one record; PCM hardly compresses, and zstd costs two thirds
# of the reading speed.
WRITER_OPTIONS = "group_size:1,uncompressed"


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


class Source:
    """Random access to the records of one split: thread-safe, and cheap to pickle for workers.

    An item is a dict: track (str), path (str), offset (int) and audio (int16 [n], read-only).
    """

    def __init__(self, directory: str, split: str):
        self._directory = str(directory)
        self._split = split
        self._fingerprint = metadata(directory)["fingerprint"]

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self._directory)

    @functools.cached_property
    def _records(self) -> Any:
        return self._builder.as_data_source(self._split)

    def shards(self) -> list[str]:
        """The file names of the shards."""
        return sorted(self._builder.info.splits[self._split].filenames)

    def shard_lengths(self) -> list[int]:
        """How many records each shard holds."""
        return list(self._builder.info.splits[self._split].shard_lengths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return record | {"track": record["track"].decode(), "path": record["path"].decode()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_records")}

    def __repr__(self) -> str:
        return f"Source(split={self._split!r}, fingerprint={self._fingerprint!r})"


def open_source(directory: str, split: str) -> Source:
    """Open a split of a prepared dataset for reading records by index.

    Raises `UserError` where the directory holds no finished dataset, or the split is not in it.
    """
    splits = metadata(directory)["splits"]
    if not splits.get(split, {}).get("records"):
        held = ", ".join(f"{name} ({v['tracks']} tracks)" for name, v in splits.items())
        raise UserError(
            f"{directory} has no records in split {split!r}; it holds {held}. Prepare more tracks, "
            "or set --validation_fraction"
        )
    source = Source(directory, split)
    present = {path.name for path in epath.Path(directory).iterdir()}
    missing = [name for name in source.shards() if name not in present]
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of its {len(source.shards())} {split} shards, "
            f"{missing[0]} first; copy the dataset again, or remove it and prepare it anew"
        )
    return source


assert SAMPLE_RATE % HOP_LENGTH == 0

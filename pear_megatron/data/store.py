"""The cache on disk: trajectories as flat, memory-mapped .npy arrays, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pear_megatron.data.columns import REFERENCE, TOPK_IDS, TOPK_LOGPROBS
from pear_megatron.data.errors import DataError
from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.storage import sync

FORMAT_VERSION = 4
_FORGOTTEN = 24 * 3600  # seconds
_META = "meta.json"
# Per token, per trajectory, and per byte of an id; offsets have one more entry than there are trajectories.
_DTYPES: dict[str, Any] = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "behavior_logprobs": np.float32,
    "offsets": np.int64,
    "rewards": np.float32,
    "num_decisions": np.int64,
    "id_bytes": np.uint8,
    "id_offsets": np.int64,
}
# Only where a trajectory has any. Per token; of the top k an entry count per decision, the entries end to end, and
# where each trajectory's entries begin.
_OPTIONAL: dict[str, Any] = {
    "token_weights": np.float32,
    REFERENCE: np.float32,
    TOPK_IDS: np.int32,
    TOPK_LOGPROBS: np.float32,
    "topk_counts": np.uint16,
    "topk_offsets": np.int64,
}
_PER_TOKEN = ("input_ids", "loss_mask", "behavior_logprobs", "token_weights", REFERENCE)
_TOPK = (TOPK_IDS, TOPK_LOGPROBS, "topk_counts", "topk_offsets")

# What a fingerprint reads in part: the arrays with an entry per token, or more.
_SAMPLED = ("input_ids", "loss_mask", "behavior_logprobs", *(n for n in _OPTIONAL if n != "topk_offsets"))
_SAMPLES = 1 << 20


class TrajectoryDataset:
    """Trajectories of a prepared cache, memory-mapped and read-only; open it with ``open``.

    Attributes:
        meta: what ``prepare`` wrote down: counts, files, ``tokenizer_hash``.
        lengths: int64 [N], tokens of each trajectory (a trajectory of n tokens takes n - 1 positions).
        num_decisions: int64 [N], decisions of each trajectory.
        rewards: float32 [N].
    """

    def __init__(self, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.meta = meta
        self._arrays = arrays
        self.lengths: np.ndarray = np.diff(arrays["offsets"])
        self.num_decisions: np.ndarray = arrays["num_decisions"]
        self.rewards: np.ndarray = arrays["rewards"]
        if self.has(TOPK_IDS):
            self._decisions = np.concatenate([[0], np.cumsum(self.num_decisions)])

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a folder that ``prepare`` made; DataError if it is not a whole one."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            if meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {meta['format_version']}, this version reads {FORMAT_VERSION}")
            names = [*_DTYPES, *(name for name in _OPTIONAL if name in meta["shapes"])]
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
            _check(meta, arrays)
        except Exception as error:  # numpy parses a header as Python's literals, and raises what that does
            raise DataError(
                f"{folder}: not a whole data cache ({error}); delete the folder and prepare it again"
            ) from error
        return cls(meta, arrays)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Trajectory:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"trajectory {index} of {n}")
        i = index % n
        arrays = self._arrays
        tokens = slice(*arrays["offsets"][i : i + 2])
        name = arrays["id_bytes"][slice(*arrays["id_offsets"][i : i + 2])].tobytes()
        return Trajectory(
            name.decode("utf-8", "surrogatepass"),
            arrays["input_ids"][tokens],
            arrays["loss_mask"][tokens],
            arrays["behavior_logprobs"][tokens],
            float(arrays["rewards"][i]),
            arrays["token_weights"][tokens] if "token_weights" in arrays else None,
            behavior_topk=self._topk(i) if self.has(TOPK_IDS) else None,
            reference_logprobs=arrays[REFERENCE][tokens] if self.has(REFERENCE) else None,
        )

    def has(self, column: str) -> bool:
        """Whether the trajectories have an optional column."""
        return column in self._arrays

    def _topk(self, i: int) -> TopK:
        entries = slice(*self._arrays["topk_offsets"][i : i + 2])
        counts = self._arrays["topk_counts"][slice(*self._decisions[i : i + 2])]
        if counts.sum() != entries.stop - entries.start:
            raise DataError(
                f"trajectory {i} of the data cache has other {TOPK_IDS} than it should; delete the cache"
            )
        return TopK(
            counts,
            self._arrays[TOPK_IDS][entries],
            self._arrays[TOPK_LOGPROBS][entries],
            self.meta["topk_width"],
        )

    def fingerprint(self) -> str:
        """Digest of the content, wherever it lies: ids, sizes and rewards whole, tokens sampled (16 hex digits)."""
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays.items()):
            stride = max(1, len(array) // _SAMPLES) if name in _SAMPLED else 1
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array[::stride]).data)
        return digest.hexdigest()[:16]

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))


def _check(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError where files do not belong together; reads those that have an entry per trajectory."""
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    if shapes != meta["shapes"]:
        raise ValueError("the arrays do not have the sizes that meta.json says")
    types = _DTYPES | _OPTIONAL
    if wrong := [name for name, array in arrays.items() if array.ndim != 1 or array.dtype != types[name]]:
        raise ValueError(f"{wrong[0]}.npy is another array")
    ends = {"offsets": [n for n in arrays if n in _PER_TOKEN], "id_offsets": ["id_bytes"]}
    if TOPK_IDS in arrays:
        ends |= {"topk_offsets": [TOPK_IDS, TOPK_LOGPROBS]}
        if arrays["num_decisions"].sum() != len(arrays["topk_counts"]):
            raise ValueError("topk_counts.npy has not one entry per decision")
    count = len(arrays["rewards"])
    for name, of in ends.items():
        offsets = arrays[name]
        whole = len(offsets) == count + 1 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
        if not whole or any(offsets[-1] != len(arrays[other]) for other in of):
            raise ValueError(f"{name}.npy does not say where trajectories begin")
    if len(arrays["num_decisions"]) != count or not isinstance(meta.get("topk_width", 0), int):
        raise ValueError("num_decisions.npy or meta.json is of another data set")
    for name in ("counts", "notes"):
        if not all(isinstance(value, int) for value in meta[name].values()):
            raise ValueError(f"meta.json: {name}")
    if not isinstance(meta["files"], list) or "tokenizer_hash" not in meta:
        raise ValueError("meta.json does not say what it was made from")


class TrajectoryWriter:
    """Writes a cache beside its place and renames it there when all of it is on the disk.

    Use as a context manager; without ``commit`` nothing is left behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(folder.parent)
        self._temporary = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex}")
        self._temporary.mkdir()
        self._streams = {
            name: _NpyStream(self._temporary / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()
        }
        self._streams["offsets"].append([0])
        self._streams["id_offsets"].append([0])
        self._topk_width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)  # gone already if it was committed
        for stream in self._streams.values():
            with suppress(OSError):  # a full disk takes no last bytes either
                stream.file.close()

    def append(self, trajectory: Trajectory) -> None:
        """Add one trajectory; all have reference_logprobs or none has, and so with behavior_topk."""
        streams = self._streams
        streams["input_ids"].append(trajectory.input_ids)
        streams["loss_mask"].append(trajectory.loss_mask)
        streams["behavior_logprobs"].append(trajectory.behavior_logprobs)
        streams["offsets"].append([streams["input_ids"].length])
        streams["rewards"].append([trajectory.reward])
        streams["num_decisions"].append([trajectory.loss_mask.sum()])
        self._append_token_weights(trajectory)
        self._append_columns(trajectory)
        name = trajectory.id.encode("utf-8", "surrogatepass")
        streams["id_bytes"].append(np.frombuffer(name, dtype=np.uint8))
        streams["id_offsets"].append([streams["id_bytes"].length])

    def _append_token_weights(self, trajectory: Trajectory) -> None:
        n = len(trajectory.input_ids)
        if trajectory.token_weights is None and "token_weights" not in self._streams:
            return
        if "token_weights" not in self._streams:
            stream = self._optional("token_weights")
            before = self._streams["input_ids"].length - n
            for start in range(0, before, _SAMPLES):
                stream.append(np.ones(min(_SAMPLES, before - start)))
        weights = trajectory.token_weights
        self._streams["token_weights"].append(np.ones(n) if weights is None else weights)

    def _append_columns(self, trajectory: Trajectory) -> None:
        first = self._streams["rewards"].length == 1
        found: dict[str, Any] = {}
        if trajectory.reference_logprobs is not None:
            found[REFERENCE] = trajectory.reference_logprobs
        topk = trajectory.behavior_topk
        if topk is not None:
            found |= {TOPK_IDS: topk.ids, TOPK_LOGPROBS: topk.logprobs, "topk_counts": topk.counts}
            self._topk_width = max(self._topk_width, int(topk.counts.max()))
        for name in (REFERENCE, *_TOPK[:3]):
            if first and name in found:
                self._optional(name)
            if (name in found) != (name in self._streams):
                raise ValueError(f"{trajectory.id}: some trajectories have {name} and some have not")
            if name in found:
                self._streams[name].append(found[name])
        if topk is not None:
            if first:
                self._optional("topk_offsets").append([0])
            self._streams["topk_offsets"].append([self._streams[TOPK_IDS].length])

    def _optional(self, name: str) -> _NpyStream:
        stream = self._streams[name] = _NpyStream(self._temporary / f"{name}.npy", _OPTIONAL[name])
        return stream

    def commit(self, meta: dict[str, Any]) -> None:
        """Make the cache readable under its name, with ``meta`` in its meta.json."""
        for stream in self._streams.values():
            stream.finish()
        shapes = {name: [stream.length] for name, stream in self._streams.items()}
        with (self._temporary / _META).open("w", encoding="utf-8") as file:
            sizes = {"shapes": shapes, "topk_width": self._topk_width}
            json.dump({"format_version": FORMAT_VERSION, **sizes, **meta}, file, indent=1)
            _sync(file)
        sync(self._temporary)
        try:
            self._temporary.rename(self._folder)
        except OSError:
            if not self._folder.exists():
                raise
            TrajectoryDataset.open(self._folder)  # another run was faster with the same data: fine
        sync(self._folder.parent)


def _remove_orphans(root: Path) -> None:
    """Removes what writers that were killed have left: folders into which nothing was written for a day.

    No lock says so more quickly: those of some network file systems hold on one node alone.
    """
    for path in root.glob(".*.partial-*"):
        with suppress(OSError):  # somebody else removes it
            written = max(part.stat().st_mtime for part in (path, *path.iterdir()))
            if not path.is_symlink() and time.time() - written > _FORGOTTEN:
                shutil.rmtree(path, ignore_errors=True)


class _NpyStream:
    """A one-dimensional .npy file that grows; its header gets the length at the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.file = path.open("wb")
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._write_header()
        self._start = self.file.tell()

    def append(self, values: Any) -> None:
        array = np.ascontiguousarray(values, dtype=self._dtype)
        self.file.write(array.data)
        self.length += len(array)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        if self.file.tell() != self._start:
            raise RuntimeError("numpy no longer leaves room in .npy headers for a longer shape")
        _sync(self.file)
        self.file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())

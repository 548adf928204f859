"""Storage: files and folders that appear whole or not at all, that a disk really holds, that one process owns."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pear_megatron.errors import PearError, RecipeError

log = logging.getLogger("pear_megatron")

PATIENCE = 120.0  # seconds: network file systems keep a lost node's locks for about a minute and a half
_QUIET = 3.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by way of a temporary one beside it; where a link is, the link and not what it names."""
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def appearing(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """The file to write first; it takes the place of ``path`` when the body ends, and is gone where that fails.

    Args:
        path: what an error of the system will name.
        partial: the file to write first; None = one beside it.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link there would have its target overwritten
    with naming(path):
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of the system name what is written to: those of a full disk name nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or ".partial" in str(error.filename)):
            error.filename = str(path)
            del error.filename2  # of a rename
        raise


def forget_steps_after(path: Path, step: int) -> None:
    """Drops the rows of a metrics.jsonl whose steps will be taken again, and damaged ones; all if the run begins."""
    if not path.exists():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if 0 < step >= json.loads(line)["step"]:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last one is what a killed run was writing
                log.warning("%s:%d is damaged and left out: that step has no row any more", path, number)
    write_atomically(path, "".join(kept))


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file that a command left holds: data, never objects.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    import yaml

    try:
        read = json.loads if path.suffix == ".json" else yaml.safe_load  # to which 1e-05 is a text
        content = read(path.read_text(encoding="utf-8"))
    except Exception as error:  # yaml raises whatever its parts do: KeyError, RecursionError, AttributeError
        raise RecipeError(f"{path} cannot be read: {error or repr(error)}; is the file whole?") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} cannot be read: it holds a {type(content).__name__}, not a mapping of keys"
        )
    return content


def remove(path: Path) -> None:
    """Takes a folder or file away, if it is there; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def is_name(name: object) -> bool:
    """Whether it can be the name of a file in a folder, and of nothing outside it."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    return len(name.encode(errors="surrogatepass")) <= 255  # what file systems take


def sync(path: Path) -> None:
    """Has the disk hold a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, *, source: Path, overwrite: bool) -> None:
    """Refuses an output folder that holds something, unless it is an earlier output that may be overwritten.

    Args:
        path: the folder to write.
        source: what it is made from, which must outlive it.
        overwrite: an earlier output may be replaced.

    Raises:
        RecipeError: it is there, or is no folder, or the source would go with it.
    """
    if path.exists() and not path.is_dir():
        raise RecipeError(f"--output {path} is a file; name a new folder")
    here, there = path.resolve(), source.resolve()
    checkpoints = ((folder / "metadata.json").is_file() for folder in (here, *here.parents))
    if here == there or here in there.parents or any(checkpoints):
        raise RecipeError(
            f"--output {path} holds {source}, or is a checkpoint: writing it would remove what it is made from; name "
            "a new folder"
        )
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if names and not overwrite:
        raise RecipeError(
            f"--output {path} is not empty; name a new folder (readers like NeMo-RL cache by path), or replace it "
            "with --overwrite"
        )
    if names and not _is_output(path, names):
        raise RecipeError(
            f"--output {path} holds more than an earlier export or conversion ({', '.join(names[:4])}, ...), and all "
            "of it would be gone; remove it yourself, or name a new folder"
        )


# What convert leaves through Megatron-Bridge, whose runs have other iterations.
_OF_BRIDGE = {"iter_0000000", "latest_checkpointed_iteration.txt", "latest_train_state.pt"}


def _is_output(path: Path, names: Sequence[str]) -> bool:
    """Whether a folder is what export or convert wrote: no run, and no folders of others."""
    if set(names) == _OF_BRIDGE:
        return True
    if "model.yaml" in names:
        return "config.yaml" not in names and "iter_0000000" in names
    exported = "config.json" in names or "adapter_config.json" in names
    return exported and not any((path / name).is_dir() for name in names)


def partial_of(path: Path) -> Path:
    """The folder beside ``path`` that is written first."""
    return path.absolute().with_name(f".{path.absolute().name}.partial")


_begun: dict[Path, int] = {}  # partial folders of this process, with the descriptor that holds each


def begin(path: Path) -> Path:
    """The empty folder beside ``path`` that is written first, held until ``publish`` or ``abandon``.

    Raises:
        PearError: another process is writing it.
        OSError: it cannot be made.
    """
    partial = partial_of(path)
    before = _hold(partial, path) if partial.is_dir() and not partial.is_symlink() else None
    remove(partial)
    partial.mkdir(parents=True)
    if before is not None:
        os.close(before)
    _begun[partial] = _hold(partial, path)
    return partial


def _hold(partial: Path, path: Path) -> int:
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise PearError(
                f"another command is writing {path}; wait for it, or name another --output"
            ) from error
    return descriptor


def abandon(path: Path) -> None:
    """Removes what ``begin`` made, if it was not published; without effect where another process made it."""
    if (descriptor := _begun.pop(partial_of(path), None)) is not None:
        remove(partial_of(path))
        os.close(descriptor)


def publish(path: Path) -> None:
    """Puts the written folder in the place of ``path``, and what was there away; what a link there names stays."""
    old = path.absolute().with_name(f".{path.absolute().name}.old")
    remove(old)
    if path.exists() or path.is_symlink():
        os.replace(path, old)
    os.replace(partial_of(path), path)
    if (descriptor := _begun.pop(partial_of(path), None)) is not None:
        os.close(descriptor)
    remove(old)


@contextmanager
def lock(
    folder: Path, what: str = "", *, other: str = "--output", patience: float = math.inf
) -> Iterator[None]:
    """Holds a folder; the end of the process lets go of it, however it came. Without effect where the file
    system has no locks.

    Args:
        folder: it is made if it is not there.
        what: whose work it is, for the message.
        other: what the user may choose another folder by, for the message.
        patience: seconds to wait for another process, which may be one that was killed and ends now, or on a node
            whose locks the file system has not given up yet.

    Raises:
        PearError: another process holds it for longer.
        OSError: it cannot be made, or is no folder.
    """
    if folder.is_symlink() and not folder.exists():
        raise PearError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there; make that folder, or choose another "
            f"{other}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        began, said = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                waited = time.monotonic() - began
                if waited > patience:
                    raise PearError(
                        f"another {what} is at work in {folder}; wait for it, or choose another {other}"
                    ) from error
                if what and waited > _QUIET and not said:
                    said = True
                    log.warning(
                        "another %s is at work in %s, or was until now; waiting for it to end", what, folder
                    )
                time.sleep(0.1)
                continue
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            break
        yield


def digest(items: Sequence[int]) -> str:
    """Twelve hex characters that differ when an item or its place does."""
    return hashlib.sha256(",".join(map(str, items)).encode()).hexdigest()[:12]


def show_bytes(size: float) -> str:
    """``3.21 GB``: bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two sets of settings."""
    keys: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


def check_same_settings(
    folder: str, old: Mapping[str, Any], new: Mapping[str, Any], *, may_change: tuple[str, ...], way_out: str
) -> None:
    """Refuses to continue in a folder what was begun with other settings.

    Args:
        folder: what the message calls it.
        old, new: the settings of what is there, and those asked for now.
        may_change: keys, or beginnings of keys, that make it no other.
        way_out: the end of the message.

    Raises:
        RecipeError: names the keys that differ.
    """
    if changes := describe_changes(old, new, but=may_change):
        raise RecipeError(f"{folder} holds a run with other settings: {changes}; {way_out}")


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any], *, but: tuple[str, ...] = ()) -> str:
    """Dotted keys whose values differ, with both values; without keys that begin with one of ``but``."""
    changed = (key for key in differing_keys(old, new) if not key.startswith(but))
    return ", ".join(f"{key} {_value(old, key)} -> {_value(new, key)}" for key in changed)


def _value(settings: Mapping[str, Any], key: str) -> str:
    """What a dotted key holds, for people; ``-`` where it is not there."""
    value: Any = settings
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return "-"
        value = value[name]
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."

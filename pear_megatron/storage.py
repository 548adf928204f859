"""Storage: files and folders that appear whole or not at all, that a disk really holds, that one process owns."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pear_megatron.errors import PearError, RecipeError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by way of a temporary one beside it; where a link is, the link and not what it names."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link there would have its target overwritten
    partial.write_text(text)
    os.replace(partial, path)


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file that a command left holds: data, never objects.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    import yaml

    try:
        read = json.loads if path.suffix == ".json" else yaml.safe_load  # to which 1e-05 is a text
        content = read(path.read_text())
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


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuses an output folder that holds something, unless it may be overwritten.

    Raises:
        RecipeError: it is there, or is no folder.
    """
    if path.exists() and not path.is_dir():
        raise RecipeError(f"--output {path} is a file; name a new folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise RecipeError(
            f"--output {path} is not empty; name a new folder (readers like NeMo-RL cache by path), or replace it "
            "with --overwrite"
        )


def partial_of(path: Path) -> Path:
    """The folder beside ``path`` that is written first."""
    return path.absolute().with_name(f".{path.absolute().name}.partial")


def publish(path: Path) -> None:
    """Puts the written folder in the place of ``path``, and what was there away; what a link there names stays."""
    old = path.absolute().with_name(f".{path.absolute().name}.old")
    remove(old)
    if path.exists() or path.is_symlink():
        os.replace(path, old)
    os.replace(partial_of(path), path)
    remove(old)


@contextmanager
def lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds a folder; the end of the process lets go of it, however it came. Without effect where the file
    system has no locks.

    Raises:
        PearError: another process holds it, and ``wait`` is False.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise PearError(
                f"another pear-megatron compare is at work in {folder}; wait for it, or choose another output_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
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
    changed = [key for key in differing_keys(old, new) if not key.startswith(may_change)]
    if changed:
        raise RecipeError(
            f"{folder} holds a run with other settings ({', '.join(changed)} differ); {way_out}"
        )

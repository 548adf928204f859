"""Identity: what decides the numbers of a scored file, so that only the same command continues or keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pear_megatron.errors import ScoreError

FORMAT_VERSION = 4
# What a user calls the parts of an identity; those without an option are named as they are.
_OPTIONS = {
    "model": "--model",
    "backend": "--backend",
    "as": "--as",
    "dtype": "--dtype",
    "max_length": "--max-length",
    "overlong": "--overlong",
    "tokenizer_hash": "tokenizer, chat template or its arguments",
    "multi_turn": "--multi-turn",
    "raw_logprobs": "--raw-logprobs",
    "top_k": "--top-k",
    "inputs": "--data",
}

Identity = Mapping[str, Any]


def digest_inputs(files: Sequence[Path]) -> list[list[Any]]:
    """[path, size, SHA-256] of each input file: its path is in the output, so it counts as well."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        digests.append([str(path), path.stat().st_size, digest])
    return digests


def same_identity(one: Identity, other: Identity) -> bool:
    """Whether two runs of `score` write the same numbers, up to rounding."""
    return not _differing(one, other)


def refuse_other(there: Identity, here: Identity, what: str) -> None:
    """Raises ScoreError that says what differs, if ``there`` is another identity than ``here``."""
    keys = _differing(there, here)
    if not keys:
        return
    shown = "; ".join(
        f"{_OPTIONS.get(key, key)}: {_shown(key, there)} there, {_shown(key, here)} now" for key in keys
    )
    raise ScoreError(
        f"{what} belongs to another command ({shown}). Give the same options and inputs to continue it, choose "
        "another --output, or start over with --overwrite"
    )


def _differing(one: Identity, other: Identity) -> list[str]:
    a, b = _comparable(one), _comparable(other)
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def _comparable(identity: Identity) -> dict[str, Any]:
    """As it is after JSON, and without the model's name: a copy of the model elsewhere is the same."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(identity)))
    if plain.get("model"):
        plain["model"].pop("name", None)
    return plain


def _shown(key: str, identity: Identity) -> str:
    value = identity.get(key)
    if key == "inputs" and isinstance(value, list):
        return ", ".join(f"{path} ({digest[:8]})" for path, _, digest in value)
    if key == "model" and isinstance(value, dict):
        return f"{value['name']} ({value['digest'][:8]})"
    return str(value)

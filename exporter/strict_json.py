"""JSON without its soft spots: UTF-8, no key twice, no NaN, no nesting without end.

Python's parser takes the last of two equal keys, which another reader may not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shuntyard.errors import CheckpointError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key '{key}' stands there twice")
            seen.add(key)
    for key in result:
        key.encode()  # a lone surrogate is no text that a file name or a message could hold
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def parse_json(text: bytes) -> Any:
    """What ``text`` says.

    Raises:
        ValueError: it is not UTF-8, not JSON, has a key twice, or is nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is not there, cannot be read, or holds something else.
    """
    try:
        raw = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file", hint=f"a checkpoint directory has a {path.name}; download it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", hint="check that you may read it") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no valid JSON: {error}", hint="download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object", hint="download it again")
    return raw

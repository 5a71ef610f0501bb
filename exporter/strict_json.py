"""JSON without its soft spots: UTF-8, no key twice, no NaN, no nesting without end.

Python's parser takes the last of two equal keys, which another reader may not.
"""

from __future__ import annotations

import json
from typing import Any


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

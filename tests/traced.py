"""Traced functions, kept by configuration: tracing is nearly all of an export's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir

from shuntyard.exporter import trace

TRACED = ("embedding_function", "rotary_function", "head_function", "layer_function")


@contextmanager
def traced_once(known: dict[Any, bytes]) -> Iterator[dict[str, Callable[..., Any]]]:
    """Traces each part of each configuration once; gives the functions that really trace.

    Only for exports whose code is as it should be: the key does not hold the code.
    """
    real = {name: getattr(trace, name) for name in TRACED}

    def once(name: str) -> Callable[..., ir.Function]:
        def get(*key: Any) -> ir.Function:
            if (name, key) not in known:
                known[name, key] = ir.to_proto(real[name](*key)).SerializeToString()
            return ir.serde.deserialize_function(onnx.FunctionProto.FromString(known[name, key]))

        return get

    with ExitStack() as stack:
        for name in TRACED:
            stack.enter_context(mock.patch.object(trace, name, once(name)))
        yield real

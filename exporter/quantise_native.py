"""The compiled twin of ``quantise``, by ctypes: the same numbers, many times as fast, while other threads run."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuntyard.exporter.quantise import DENOMINATORS
from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.plugins.library import quantise_library_path

_COUNT, _ARRAY = ctypes.c_size_t, ctypes.c_void_p
_MATRIX = (ctypes.c_int, _ARRAY, ctypes.c_int, ctypes.c_int, _COUNT, _COUNT, _COUNT)

AVX512, AVX2, NEITHER = 2, 1, 0
"""The instruction sets that may be taken where there are such."""


class Native:
    """The functions of a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Finds them.

        Raises:
            AttributeError: they are not there.
        """
        self._fp8, self._int4 = library.shuntyard_quantise_fp8, library.shuntyard_quantise_int4
        self._fp8.argtypes = (*_MATRIX, ctypes.c_int, _ARRAY, _ARRAY)
        self._int4.argtypes = (*_MATRIX, _COUNT, _ARRAY, _COUNT, _ARRAY, _ARRAY)
        self._fp8.restype = self._int4.restype = None
        self._read = library.shuntyard_read_rows
        self._read.argtypes = (ctypes.c_int, ctypes.c_uint64, _COUNT, _COUNT, _COUNT, _ARRAY, _COUNT)
        self._read.restype = _COUNT

    def quantise_rows(
        self, values: NDArray[Any], how: Quantize, codes: NDArray[Any], scales: NDArray[Any], best: int = AVX512
    ) -> None:
        """As ``quantise_stream.quantise_rows``. Each row of ``values`` is contiguous, or each column."""
        item, (rows, columns) = values.dtype.itemsize, values.shape
        turned = columns > 1 and values.strides[1] != item
        stride, step = (values.strides[1], values.strides[0]) if turned else values.strides
        assert stride % item == 0 and (step == item or min(rows, columns) == 1)
        assert codes.flags.c_contiguous and scales.flags.c_contiguous
        matrix = (best, values.ctypes.data, int(item == 2), int(turned), stride // item, rows, columns)
        made = (scales.ctypes.data, codes.ctypes.data)
        if how.form == "group":
            self._int4(*matrix, how.group_size, DENOMINATORS.ctypes.data, len(DENOMINATORS), *made)
        else:
            self._fp8(*matrix, int(how.form == "channel"), *made)

    def read_rows(self, descriptor: int, offset: int, into: NDArray[np.uint8], stride: int) -> int:
        """Fills rows of ``into``, each of them contiguous, with bytes that lie ``stride`` apart from ``offset`` on.

        Returns:
            How many rows were filled, before one that did not come whole.
        """
        rows, width = into.shape
        assert width == 1 or into.strides[1] == 1
        count: int = self._read(descriptor, offset, rows, width, stride, into.ctypes.data, into.strides[0])
        return count


@functools.cache
def native() -> Native | None:
    """The installed library; None where there is none that can be used."""
    path = quantise_library_path()
    if path is None:
        return None
    try:
        return Native(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None

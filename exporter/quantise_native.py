"""The compiled twin of ``quantise``, by ctypes: the same numbers, ten times as fast, while other threads run."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from numpy.typing import NDArray

from shuntyard.exporter.quantise import DENOMINATORS
from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.plugins.library import quantise_library_path

_COUNT, _ARRAY = ctypes.c_size_t, ctypes.c_void_p
_MATRIX = (_ARRAY, ctypes.c_int, _COUNT, _COUNT)


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

    def quantise_rows(self, values: NDArray[Any], how: Quantize, codes: NDArray[Any], scales: NDArray[Any]) -> None:
        """As ``quantise_stream.quantise_rows``; all arrays are contiguous."""
        assert all(array.flags.c_contiguous for array in (values, codes, scales))
        matrix = (values.ctypes.data, int(values.dtype.itemsize == 2), *values.shape)
        made = (scales.ctypes.data, codes.ctypes.data)
        if how.form == "group":
            self._int4(*matrix, how.group_size, DENOMINATORS.ctypes.data, len(DENOMINATORS), *made)
        else:
            self._fp8(*matrix, int(how.form == "channel"), *made)


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

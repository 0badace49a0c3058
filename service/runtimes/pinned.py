"""
Page-locked memory, from which a GPU copies directly. From other memory CUDA makes a copy first.

Existing arrays are registered with CUDA's runtime (cudaHostRegister), so their users need no
change.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from typing import Any

import numpy.typing as npt

log = logging.getLogger(__name__)

# CUDA 13's runtime. The GPU providers are linked with it, so it is loaded wherever they are.
LIBRARY = "libcudart.so.13"


def pin(array: npt.NDArray[Any]) -> bool:
    """Lock an array's memory for as long as the array lives, and return whether it succeeded.

    Copies are correct either way.
    """
    library = _library()
    if library is None or not array.nbytes:
        return False
    address = ctypes.c_void_p(array.ctypes.data)
    status = library.cudaHostRegister(address, ctypes.c_size_t(array.nbytes), ctypes.c_uint(0))
    if status != 0:
        library.cudaGetLastError()  # Clears it, or the next caller would take it for its own.
        log.info(
            "a GPU's host buffer is not page-locked",
            extra={"bytes": array.nbytes, "cuda_error": status},
        )
        return False
    # Not at the end of the process, when CUDA may be unloaded already.
    weakref.finalize(array, library.cudaHostUnregister, address).atexit = False
    return True


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None

"""
Page-locked memory: a GPU copies from it by itself and at once, where it would else be handed a copy
first.

What is there already is registered with CUDA's runtime (cudaHostRegister), so that nothing else
need know of it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from typing import Any

import numpy.typing as npt

log = logging.getLogger(__name__)

# Of CUDA 13; the providers for GPUs are linked with it, so it is loaded where they are.
LIBRARY = "libcudart.so.13"


def pin(array: npt.NDArray[Any]) -> bool:
    """Locks an array's memory for as long as the array lives, and says whether it could: copies are
    right either way.
    """
    library = _library()
    if library is None or not array.nbytes:
        return False
    address = ctypes.c_void_p(array.ctypes.data)
    status = library.cudaHostRegister(address, ctypes.c_size_t(array.nbytes), ctypes.c_uint(0))
    if status != 0:
        library.cudaGetLastError()  # or the next who asks takes it for its own
        log.info(
            "a GPU's host buffer is not page-locked",
            extra={"bytes": array.nbytes, "cuda_error": status},
        )
        return False
    # Not at the process's end, where CUDA may have gone before.
    weakref.finalize(array, library.cudaHostUnregister, address).atexit = False
    return True


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None

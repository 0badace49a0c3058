"""
Limit ONNX Runtime's threads to the processors of the process, for servers without an option for it.
"""

from __future__ import annotations

import os
from typing import Any

import onnxruntime

real = onnxruntime.InferenceSession.__init__


def limited(
    self: Any, path_or_bytes: Any, sess_options: Any = None, *rest: Any, **more: Any
) -> None:
    """Create a session with one thread for each processor of the process."""
    options = sess_options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    real(self, path_or_bytes, options, *rest, **more)


onnxruntime.InferenceSession.__init__ = limited

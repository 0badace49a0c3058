"""
Has ONNX Runtime start as many threads as the process has processors, for servers that have no
option for it.
"""

from __future__ import annotations

import os
from typing import Any

import onnxruntime

real = onnxruntime.InferenceSession.__init__


def limited(
    self: Any, path_or_bytes: Any, sess_options: Any = None, *rest: Any, **more: Any
) -> None:
    options = sess_options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    real(self, path_or_bytes, options, *rest, **more)


onnxruntime.InferenceSession.__init__ = limited

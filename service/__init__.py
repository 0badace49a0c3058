"""The service: answers POST /classify with the artifacts that export writes.

    http          requests and answers, on the public and the private port
    tokenization  texts to tokens
    batching      the queue, and the thread that runs the models
    runtimes      engines: OpenVINO, ONNX Runtime, CUDA, TensorRT
    checkpoints   Hugging Face checkpoints, exported into a cache by a process of their own
    telemetry     metrics, spans, logs
    host          processors, GPUs, memory, files, threads
    plain         answers without a server, to compare the service's with

It needs neither torch nor transformers, and knows nothing of how artifacts are made or measured
except for the command that makes them.
tests/test_layers.py holds which sub-package may import which.
"""

from command import report_missing_packages

report_missing_packages("service")

"""Export: turns a fine-tuned checkpoint into an artifact that the service can load.

    checkpoint  a Hugging Face folder, read and built without its pretraining decoder
    graph       the model as ONNX, and its variants
    checks      verification against transformers, and the accuracy gate

It does not know HTTP or the batcher: the service knows artifacts only.
"""

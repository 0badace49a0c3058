"""Graphs: a torch model as ONNX, attention in the form that engines fuse, and its variants."""

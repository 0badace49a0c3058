"""Graphs: writes a torch model as ONNX, with attention that engines fuse, and builds variants."""

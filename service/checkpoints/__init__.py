"""
Checkpoints as models: a Hugging Face folder or hub id is exported once, and its artifact is cached.

    source   PATH_OR_ID[@REVISION], and the folder that it means
    digest   what identifies an export: the checkpoint's files, the options, the exporter
    exporter `drbert-export` in a process of its own
    cache    artifacts by digest: found, or exported by one process at a time
"""

"""
The host: processors, GPUs, memory, files that others replace, and threads.

The lowest layer: it imports nothing of ours but itself and `service.errors`.
"""

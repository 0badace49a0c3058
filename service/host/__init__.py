"""
The host: processors, GPUs, memory, files that others replace, and threads.

This is the lowest layer of the service. It imports only itself, `service.errors` and `command`.
"""

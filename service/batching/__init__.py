"""
Batching: the queue, admission, the shapes of batches, and the thread that runs them.

It moves requests to a model's start function and results back to the callers. It does not know
HTTP, tokenizers or engines: it imports nothing of ours but itself and `service.errors`.
"""

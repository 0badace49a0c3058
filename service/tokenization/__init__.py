"""
Tokenization: a request's texts to encoded texts, with truncation, windows and limits.

It runs long work in threads, so that the event loop is not held up. It does not know HTTP or
dialects.
"""

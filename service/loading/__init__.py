"""
Loading: from an artifact to an engine that is warm and checked, chosen by measurement if need be.

Nothing here knows HTTP, queues or the other models of the process.
"""

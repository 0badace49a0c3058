"""
Answers without a server: what the service's answers must equal.

It loads an engine as the service does, and knows neither HTTP nor queues nor packing.
"""

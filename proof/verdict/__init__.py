"""
Verdicts: judge sealed evidence, compare graphs, and verify a claim in a pipeline.

It reads evidence alone: it neither starts servers nor draws reports.
"""

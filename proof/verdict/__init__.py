"""
Verdicts: judges sealed evidence, compares graphs, and verifies a claim in a pipeline.

It reads evidence alone. It does not start servers or draw reports.
"""

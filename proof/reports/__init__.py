"""
Reports: a verdict as one HTML file without network or script, and as Markdown.

It decides nothing: every number comes from the verdict or the evidence.
"""

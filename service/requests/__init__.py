"""
Parts of a request: the structure of its JSON, and the labels that it names for its texts.
"""

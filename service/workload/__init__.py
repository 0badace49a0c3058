"""
One loaded artifact that runs a chosen batch a chosen number of times, so that its work can be
counted from outside.

It is the service's own classifier without server, queue and warm-up. It does not know who counts,
or how.
"""

"""Compares two running servers of one classifier: their answers, latency and throughput.

    target    the two servers, and the format that each of them reads
    answers   which texts get another label, and how far scores lie apart
    load      requests, some in flight at a time, to one server
    timing    both servers in turn, and the ratios of their times
    report    tables, JSON and a page

It is a quick look. `drbert-prove` is the proof.
"""

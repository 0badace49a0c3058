"""Compares two running servers of one classifier: their answers, latency and throughput.

    formats   how a text is sent to a server, and how its answer is read
    target    one of the two servers, and a request to it
    probing   finds out which format a server has
    answers   which texts get another label, and how far scores lie apart
    load      requests, some in flight at a time, to one server
    timing    both servers in turn, and the ratios of their times
    report    tables, JSON and a page

It is a quick look. `drbert-prove` is the proof.
"""

"""The proof: plans, measures, judges and reports latency equivalence.

    plans      what is claimed and how it is measured
    sizing     how many restarts a claim needs
    measuring  servers, the load generator, a run
    evidence   rows of requests, sealed and audited
    work       instructions for a text, counted
    verdict    the judge
    reports    HTML and Markdown

A sceptic can judge the evidence again without the service. It does not know the service's code,
except for how an artifact's manifest is read.
"""

"""
Work, counted: the instructions that two artifacts execute for one text.

    counters  hardware counters of a process, by perf_event_open
    workload  a process that runs batches of an artifact, with its counter
    counting  shapes, copies and processes of one comparison
    schema    work.json, and the verdict that follows from its counts
    sealed    work.json as a part of a run's evidence

It does not know the service's code, time, or load: the batches run in a process of the service
(service/workload), and this package only counts.
"""

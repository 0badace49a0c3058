"""
Plans: what a proof claims and how it is measured, fixed before the first request.

The schedule of every request is a function of the plan. Nothing here knows evidence or verdicts.
"""

"""
Evidence: rows of requests, their seal, the audit against the plan, and numbers per restart.

It knows neither how rows are measured nor what is concluded from them.
"""

"""Plans, runs, judges and reports latency equivalence, so that a sceptic can judge it again."""

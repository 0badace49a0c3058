"""What the service does when everything goes wrong: `python -m tests.chaos`, see __main__.py."""

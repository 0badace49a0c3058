"""The load test: `locust -f loadtests/` loads locustfile.py, and nothing that begins with `_`."""

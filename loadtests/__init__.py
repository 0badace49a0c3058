"""The load generator: `locust -f loadtests/` loads every file that does not begin with `_`."""

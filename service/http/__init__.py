"""
HTTP: requests in, answers out, on the public port and on the private one.

    transport   bytes of a connection: limits of size and time, compression
    dialects    request and answer formats, one module each
    endpoint    a classification from the request's body to the answer's
    router      which path is which dialect; stands in front of FastAPI
    routes      the application: middleware, health, metrics, pages

It knows the registry and the batcher. It does not know engines: nothing here imports
`service.runtimes`, and nothing below imports `service.http`.
"""

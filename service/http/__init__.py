"""HTTP: requests in, answers out, on the public port and on the private one.

    transport   bytes of a connection: limits of size and time, compression
    dialects    request and answer formats, one module each
    router      which path is which dialect; stands in front of FastAPI
    endpoint    a classification, from the request's body to the answer's
    routes      the public port's application: health, metrics, pages
    middleware  headers of every answer, and keys
    admin       the private port's application: loads and unloads models

It knows the models and the batcher. It does not know engines: nothing here imports
`service.runtimes`, and nothing but the server imports `service.http`.
"""

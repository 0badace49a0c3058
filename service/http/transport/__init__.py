"""
Connections: messages, bodies and answers as bytes, each bounded in size and in time.

It builds on uvicorn's protocol class. It knows no model, no dialect and no path.
"""

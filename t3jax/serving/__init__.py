"""A server: an engine that batches requests as they come, HTTP around it, requests to forget.

The engine (`engine.py`, its device programs in `programs.py`, heads in `stack.py`) knows no HTTP.
The server (`app.py`, bodies in `protocol.py` and `answers.py`, `metrics.py`, `page.html`) needs the
extra `t3jax[serve]`. Requests to forget are kept in `requests.py`, and become heads in
`training.py`.
"""

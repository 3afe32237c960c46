"""`exl serve`: one model for several programs, through the OpenAI HTTP API. Needs the extra `server`.

`settings.py`  what the server is told at its start        `app.py`        the routes, and how errors are answered
`guard.py`     who may come in: key, origin, host; the log `body.py`       JSON bodies and their limits
`fields.py`    typed reading of a request                  `asks.py`       from a body to what is asked
`messages.py`  conversations and tools for the template    `constraints.py` response_format, tool_choice
`desk.py`      requests on their way: queue, limits, cancel `choice.py`     one reply: thoughts, calls, text
`shapes.py`    the objects of the protocol                 `stream.py`     server-sent events
`problems.py`  errors in the protocol's shape              `place.py`      what the endpoints share
`chat.py` `completions.py` `small.py`  the endpoints       `run.py`        sockets, signals, uvicorn

Nothing here reads or serves a file, and no prompt is ever logged.
"""

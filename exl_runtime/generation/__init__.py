"""From requests to replies: many at once, sharing every step and every common prefix. Knows no chat and no files.

`request.py`   what is asked, what comes back, the states between   `stream.py`    events, and text up to a stop string
`intake.py`    from a request to a sequence: limits, overflow       `stops.py`     stop ids and stop strings
`sequence.py`  the mutable side of a request                        `scheduler.py` who runs next, in which pages
`rolling.py`   sequences that outgrow their context                 `engine.py`    one step after another
`runner.py`    a step as one forward pass
`generator.py` the front: submit, cancel, stream, from any thread

Guesses ahead: `speculation.py` who guesses, `lookup.py` from the text so far, `drafting.py` with a second model,
`pace.py` how far. Constraints: `steering.py` edits logits, `grammar.py` and `matching.py` grammars, `banning.py` banned
strings, `vocabulary.py` what tokens spell, `guidance.py` classifier-free guidance.
"""

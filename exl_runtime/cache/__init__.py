"""Keys and values in pages, and which prefix lies where. Knows no text, no model and no requests.

`types.py`     how a key or a value is held      `names.py`  what users call that
`geometry.py`  sizes, and what memory is free     `storage.py`  the tensors behind the pages
`pages.py`     who holds which page, what is next `prefix.py`   what the pages hold, by chained hashes
`pools.py`     several page tables as one, where layers see different windows
`window.py`    what leaves when a context overflows
`sinks.py`     the first tokens, which stay and move along when others leave
"""

"""What every program of this project does at a terminal. Knows no models and no torch.

`terminal.py`  what text may do to a terminal, and what a terminal can do
`progress.py`  long work as bars, sparse lines or JSON lines        `bars.py`  the bars
`program.py`   a command line from its first argument to its exit code
"""

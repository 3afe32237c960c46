"""How fast: tokens per second of a model, of its peers in the same minute, and of single operations.

spread.py     medians with their range            timers.py     seconds on a CPU or a GPU
bandwidth.py  what memory gives here and now      traffic.py    bytes a token moves
workload.py   what is run: prompts, lengths       contestant.py who runs it: this runtime
peers/        or another program                  race.py       everyone in turn, again and again
report.py     the table                           cases.py      operations at real shapes, with torch beside
kernels.py    their times with cold caches
"""

"""Questions with answers, asked of a model through its chat template.

suite.py      what a task is, read from JSON lines       builtin/      the suite that comes along
asking.py     replies to all turns, several at once      judging.py    from replies to scores, by metric
answers.py    exact match, F1, numbers                   objects.py    JSON against JSON
checks.py     instructions a program can verify          corpus.py     BLEU and chrF
code.py       pass@k                                     sandbox.py    code in a process of its own (confined.py)
custom.py     metrics of the user's own                  bootstrap.py  confidence intervals
results.py    a table, facts, and a line per task
"""

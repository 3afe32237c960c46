"""`python -m eval`: what a model is worth, by protocols that stand beside every number.

cli.py           the commands, one file each in `commands/`
opening.py       from arguments to an opened model          outcome.py         what a command gives

data.py          which text: found, downloaded or given     corpora.py, download.py   WikiText-2 and C4
protocol.py      how a text becomes scored windows          scoring.py         log-probabilities of windows
perplexity.py    and what they sum to                       divergence.py      KL and agreement with another model
reference.py     what the source says, kept on disk         reference_file.py, logprobs.py, identity.py   how, and whose
tasks/           questions with answers                     layers.py          errors of single matrices

measuring.py     the work that comparisons share            comparison.py      their results as a table
compare.py       many models, many cache types              saved.py           results of earlier runs
recommend.py     which one to take                          advice.py          said in words
tables.py        for terminals                              report.py, plots.py   for browsers

speed/           tokens per second, kernels, peers          made/              models with random weights
"""

"""The conversation and its terminal. Talks to a `Runtime`; knows no kernels, formats or tensors.

Nothing is imported here: `exl --help` and `terminal.py` must stay free of torch.
"""

"""The conversation and its terminal. Talks to a `Runtime`; knows no kernels, formats or tensors.

Nothing is imported here: `exl --help` and `cli` must stay free of torch.
"""

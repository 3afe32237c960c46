"""From logits to a token: parameters, transforms, penalties, masks, the pipeline and its random numbers.

Ids in, ids out: this room knows no text, no tokenizer and no model. Importing it loads neither torch nor numpy.

`params.py`      what a caller may set, and the checks          `order.py`     the steps: names, order, when they act
`transforms.py`  temperature and threshold cuts                 `ranked.py`    cuts that need the ranking of tokens
`feedback.py`    mirostat and adaptive-p, which keep state      `penalties.py` what depends on the tokens so far
`masks.py`       bias, ban, allow                               `history.py`   the tokens so far as one array
`random.py`      a number per (seed, token index)               `draw.py`      the draw itself, and log-probabilities
`pipeline.py`    parameters -> steps                            `sampler.py`   `Sampler` and `sample_batch`
`rules.py`       the checks behind `params.py`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .draw import Draw
    from .params import SamplingParams
    from .sampler import Sampler, sample_batch

__all__ = ["Draw", "Sampler", "SamplingParams", "sample_batch"]

_HOME = {"Draw": "draw", "SamplingParams": "params", "Sampler": "sampler", "sample_batch": "sampler"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

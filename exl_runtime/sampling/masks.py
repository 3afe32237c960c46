"""Steps that name tokens: ban, allow, bias. Ids must lie within the row; `pipeline.py` sees to that.

Same contract as `transforms.py`, except that a mask may remove everything: whoever applies it has to look.
"""

import numpy as np
from numpy.typing import NDArray

from .transforms import REMOVED, Logits

Ids = NDArray[np.int64]


def ban(x: Logits, ids: Ids) -> Logits:
    """Removes these tokens."""
    changed = x.copy()
    changed[ids] = REMOVED
    return changed


def allow_only(x: Logits, ids: Ids) -> Logits:
    """Removes all tokens but these."""
    changed = np.full_like(x, REMOVED)
    changed[ids] = x[ids]
    return changed


def bias(x: Logits, ids: Ids, amounts: NDArray[np.float32]) -> Logits:
    """Adds amounts[i] to the logit of ids[i]; each id at most once. A removed token stays removed."""
    changed = x.copy()
    changed[ids] += amounts
    return changed

"""Code in replies: which part of a reply is code, and pass@k. Runs nothing itself."""

import math
import re

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def find_code(reply: str) -> str:
    """The first fenced block, marked as Python or not at all; without one, the whole reply."""
    block = _FENCE.search(reply)
    return block.group(1) if block else reply


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Chance that of `k` samples at least one passes, estimated without bias from `n` samples of which some passed.

    1 - C(n - passed, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    Raises ValueError unless 1 <= k <= n and 0 <= passed <= n.
    """
    if not (1 <= k <= n and 0 <= passed <= n):
        raise ValueError(f"no pass@{k} from {n} samples with {passed} passed")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)

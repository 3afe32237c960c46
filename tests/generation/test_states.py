"""Requests, their states, and what a request may ask for."""

import itertools

import pytest
from fakes import request

from exl_runtime.errors import UsageError
from exl_runtime.generation.request import TRANSITIONS, IllegalTransition, Request, RequestState, check_transition

Q, P, D, FIN, FAIL = RequestState
ALLOWED = {(Q, P), (P, D), (P, Q), (D, Q), (Q, FIN), (P, FIN), (D, FIN), (Q, FAIL), (P, FAIL), (D, FAIL)}


@pytest.mark.parametrize(("present", "following"), list(itertools.product(RequestState, repeat=2)))
def test_every_pair_of_states(present: RequestState, following: RequestState) -> None:
    assert set(TRANSITIONS) == set(RequestState)
    if (present, following) in ALLOWED:
        check_transition("r", present, following)
        return
    with pytest.raises(IllegalTransition, match=f"r: {present.name} cannot become {following.name}"):
        check_transition("r", present, following)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": "abc"}, "stop is 'abc'"),
        ({"stop": ("a", "")}, "not empty"),
        ({"deadline": 0.0}, "deadline is 0.0"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"overflow": "forget"}, "error, drop, window"),
        ({"keep": -1}, "keep is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Request(**{"prompt": (1,), **settings})


def test_a_request_is_frozen() -> None:
    with pytest.raises(AttributeError):
        request([1]).max_tokens = 3

"""What may be set, what is refused and in which words, and what the chain says it does."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from exl_runtime.errors import UsageError
from exl_runtime.sampling import SamplingParams
from exl_runtime.sampling.order import DEFAULT_ORDER, active_steps, resolve_order


def test_defaults_are_neutral_but_for_two() -> None:
    params = SamplingParams()
    assert (params.temperature, params.min_p) == (0.8, 0.05)
    assert active_steps(params) == ("temperature", "min_p")
    assert active_steps(SamplingParams(temperature=1, min_p=0)) == ()


REFUSED = [
    ("temperature", -0.1), ("temperature", 101), ("top_k", -1), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.01),
    ("min_p", -0.01), ("min_p", 1.5), ("top_a", 2), ("typical_p", 0), ("tfs", 0), ("epsilon_cutoff", -1),
    ("eta_cutoff", 2), ("top_n_sigma", -1), ("xtc_probability", 1.1), ("xtc_threshold", -0.1),
    ("repetition_penalty", 0), ("frequency_penalty", 11), ("presence_penalty", -11), ("penalty_range", -2),
    ("penalty_decay", -1), ("dry_multiplier", -1), ("dry_base", 0.5), ("dry_allowed_length", -1), ("dry_range", -2),
    ("dry_max_ngram", 0), ("no_repeat_ngram_size", -1), ("min_temp", -1), ("max_temp", 1000), ("temp_exponent", 0),
    ("smoothing_factor", -1), ("smoothing_curve", 0.5), ("mirostat", 3), ("mirostat_tau", -1), ("mirostat_eta", 11),
    ("adaptive_target", 1.5), ("adaptive_target", -0.5), ("adaptive_decay", 1), ("skew", 11), ("min_tokens", -1),
    ("min_keep", 0), ("logprobs", -1), ("seed", -1), ("seed", 2**64),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_out_of_range_names_parameter_value_and_range(name: str, value: float) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    text = str(caught.value)
    assert name in text and f"{value}" in text and "allowed" in text


NUMBERS = [spec.name for spec in fields(SamplingParams) if "rule" in spec.metadata]


def test_the_refusals_cover_every_number() -> None:
    assert set(NUMBERS) == {name for name, _ in REFUSED}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, "1", True, [1], 1j])
def test_nan_and_other_types_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature_last", 1), ("ignore_eos", "yes"), ("banned_tokens", "12"), ("banned_tokens", [-1]),
        ("banned_tokens", [1.5]), ("banned_tokens", 3), ("allowed_tokens", []), ("xtc_exempt_tokens", [None]),
        ("dry_sequence_breakers", "\n"), ("dry_sequence_breakers", [""]), ("logit_bias", [1]),
        ("logit_bias", {1: math.nan}), ("logit_bias", {"x": 1}), ("logit_bias", {1: math.inf}), ("logit_bias", {-1: 1}),
        ("order", "min_p"), ("order", ["nope"]), ("order", ["min_p", "min_p"]), ("order", [3]),
    ],
)  # fmt: skip
def test_malformed_collections_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="max_temp"):
        SamplingParams(min_temp=2, max_temp=1)
    with pytest.raises(UsageError, match="temperature_last"):
        SamplingParams(temperature_last=True, order=("temperature", "min_p"))
    with pytest.raises(UsageError, match="banned_tokens"):
        SamplingParams(allowed_tokens=(1, 2), banned_tokens=(1, 2, 3))


def test_frozen_and_without_unknown_names() -> None:
    params = SamplingParams()
    with pytest.raises(FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(0.7)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("temprature", "temperature"), ("temp", "temperature"), ("top-q", "top_p"),
     ("repeat_penalty", "repetition_penalty"), ("dry_mult", "dry_multiplier"), ("Typical", "typical_p"),
     ("samplers", "order")],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams.from_dict({typed: 1})
    assert repr(typed) in str(caught.value) and f"did you mean {meant!r}" in str(caught.value)


def test_round_trip_through_json() -> None:
    params = SamplingParams(
        temperature=0.5, seed=3, logit_bias={7: -2.5, 3: 1}, banned_tokens=[9, 2, 9], allowed_tokens={5, 6}, mirostat=2,
        order=["min_p", "temperature"], dry_sequence_breakers=["\n"], ignore_eos=True,
    )  # fmt: skip
    assert params.banned_tokens == (2, 9)
    again = SamplingParams.from_dict(json.loads(json.dumps(params.to_dict())))
    assert again == params and hash(again) == hash(params)
    assert SamplingParams.from_dict({}) == SamplingParams()
    assert replace(params, temperature=1).temperature == 1.0
    assert set(params.to_dict()) == {spec.name for spec in fields(SamplingParams)}


def test_caller_keeps_no_hand_in_the_bias() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 99.0
    assert params.logit_bias == {1: 2.0}


def test_named_steps_trade_places() -> None:
    assert resolve_order(SamplingParams()) == DEFAULT_ORDER
    assert resolve_order(SamplingParams(order=DEFAULT_ORDER[::-1])) == DEFAULT_ORDER[::-1]
    names = resolve_order(SamplingParams(order=("min_p", "temperature")))
    assert set(names) == set(DEFAULT_ORDER) and len(names) == len(DEFAULT_ORDER)
    assert names.index("min_p") == DEFAULT_ORDER.index("temperature")
    assert names.index("temperature") == DEFAULT_ORDER.index("min_p")
    rest = [name for name in names if name not in ("min_p", "temperature")]
    assert rest == [name for name in DEFAULT_ORDER if name not in ("min_p", "temperature")]


def test_temperature_last() -> None:
    names = resolve_order(SamplingParams(temperature_last=True))
    assert names[names.index("temperature") - 1] == "xtc" and names[names.index("temperature") + 1] == "mirostat"


def test_effective_chain_reads_like_the_chain() -> None:
    assert SamplingParams().effective_chain() == ["temperature 0.8", "min_p 0.05", "draw"]
    assert SamplingParams(temperature_last=True, top_k=40, seed=7).effective_chain() == [
        "top_k 40", "min_p 0.05", "temperature 0.8", "draw (seed 7)",
    ]  # fmt: skip
    params = SamplingParams(
        temperature=0, top_k=3, repetition_penalty=1.1, penalty_range=64, banned_tokens=[1], xtc_probability=1
    )
    assert params.greedy
    assert params.effective_chain() == [
        "ban 1 tokens", "repetition_penalty 1.1 (the last 64 tokens)", "take the best token (greedy)",
    ]  # fmt: skip


def test_every_step_speaks() -> None:
    params = SamplingParams(
        logit_bias={1: 1}, frequency_penalty=0.1, dry_multiplier=0.8, no_repeat_ngram_size=3, min_temp=0.5,
        max_temp=1.5, smoothing_factor=0.2, top_n_sigma=1, top_k=5, typical_p=0.9, tfs=0.9, top_a=0.1, top_p=0.9,
        epsilon_cutoff=0.01,
        eta_cutoff=0.01, xtc_probability=0.5, mirostat=2, adaptive_target=0.4, skew=0.1,
    )  # fmt: skip
    assert active_steps(params) == DEFAULT_ORDER
    assert len(params.effective_chain()) == len(DEFAULT_ORDER) + 1

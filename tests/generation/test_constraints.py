"""Banned strings, loops, processors, scores of the prompt: over fakes, so that every mistake shows."""

import random
from dataclasses import replace

import pytest
import torch
from fakes import EOS, VOCAB, Rig, expected, letter, logits_of, request, text_of
from guessing import check_pages, knowing
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.errors import UsageError
from exl_runtime.generation.banning import Bans, fold
from exl_runtime.generation.steering import Steering
from exl_runtime.generation.stops import is_loop
from exl_runtime.generation.stream import Finished, Text, Trim
from exl_runtime.sampling.draw import inverse_cdf
from exl_runtime.sampling.params import SamplingParams
from exl_runtime.sampling.sampler import Sampler

Z = 25  # FakeDetokenizer holds it back


def run(rig: Rig, asked: object) -> tuple[object, str]:
    """The result, and the text as events told it."""
    rig.generator.submit(asked)
    told, ids, result = "", (), None
    while rig.generator.busy:
        for event in rig.generator.step():
            if isinstance(event, Text):
                told, ids = told + event.text, ids + event.ids
                assert event.text or event.ids
            elif isinstance(event, Finished):
                result = event.result
        check_pages(rig)
    rig.check()
    assert ids == result.ids
    return result, told


def without(prompt: list[int], count: int, seed: int, strings: list[str]) -> list[int]:
    """The definition: redraw at the token in which a banned string began, with what led there removed."""
    rig_sampler = Rig().generator._intake._make_sampler(request(prompt, seed=seed), seed)
    ids: list[int] = []
    removed: dict[int, set[int]] = {}
    while len(ids) < count and EOS not in ids:
        logits = logits_of([*prompt, *ids]).clone()
        logits[list(removed.get(len(ids), ()))] = -torch.inf
        ids.append(rig_sampler.sample(logits, prompt, ids).id)
        text = "".join(map(letter, ids))
        starts = [at for string in strings if (at := text.find(string)) >= 0]
        if starts and ids[-1] != EOS:
            at = min(starts)
            if ids[max(0, at - 1)] == Z and ids[max(0, at - 2) : at] != [Z, Z]:
                at -= 1  # what a token holds back comes out with the next: it counts as having begun there
            removed = {place: tokens for place, tokens in removed.items() if place <= at}
            removed.setdefault(at, set()).add(ids[at])
            del ids[at:]
    return ids


@pytest.mark.parametrize("right", [None, 0.7])
@pytest.mark.parametrize("seed", range(6))
def test_banned_strings(seed: int, right: float | None) -> None:
    prompt = [seed, 3, 5]
    free = text_of(expected(prompt, 24, seed=seed))
    strings = [free[k : k + length] for k, length in ((2, 3), (5, 2), (0, 1)) if len(free) > k + length]
    strings = [string for string in strings if "z" not in string]
    rig = Rig(pages=64, context=64)
    if right is not None:
        knowing(rig, right, random.Random(seed))
    asked = request(prompt, 24, seed=seed, banned_strings=tuple(string.upper() for string in strings), logprobs=1)
    result, told = run(rig, asked)
    wanted = without(prompt, 24, seed, strings)
    assert result.ids == tuple(wanted) and len(result.logprobs) == len(wanted)
    assert result.text == told == text_of(wanted)
    assert not any(string in result.text for string in strings)
    assert text_of(wanted) != free


@pytest.mark.parametrize("right", [None, 0.8])
def test_a_sampler_with_state_is_taken_back_with_the_text(right: float | None) -> None:
    """Against new samplers that draw the whole reply again after every ban."""
    prompt, count, seed, params = [3, 5], 16, 5, {"mirostat": 2, "mirostat_tau": 1.2, "mirostat_eta": 0.6}
    ban, removed, ids = None, {}, []
    while len(ids) < count:
        sampler, ids = Sampler(SamplingParams(**params), vocab_size=VOCAB, seed=seed), []
        while len(ids) < count and EOS not in ids:
            logits = logits_of([*prompt, *ids]).clone()
            logits[list(removed.get(len(ids), ()))] = -torch.inf
            logits[[EOS, Z]] = -torch.inf
            ids.append(sampler.sample(logits, prompt, ids).id)
            if ban and (at := "".join(map(letter, ids)).find(ban)) >= 0:
                removed = {place: tokens for place, tokens in removed.items() if place <= at}
                removed.setdefault(at, set()).add(ids[at])
                break
        if ban is None:
            ban, ids = "".join(map(letter, ids[3:5])), []
    rig = Rig(pages=64)
    rig.generator._intake._make_sampler = rig.generator._intake._default_sampler
    if right is not None:
        knowing(rig, right, random.Random(1))
    sampling = SamplingParams(seed=seed, banned_tokens=(EOS, Z), **params)
    asked = replace(request(prompt, count, banned_strings=(ban,)), sampling=sampling)
    assert run(rig, asked)[0].ids == tuple(ids)


def test_bans_behind_a_place_that_changes_are_forgotten() -> None:
    steering = Steering()
    for index, token in ((5, 1), (3, 2), (4, 7), (3, 4)):
        steering.back(index, 1, token)
    assert steering.banned == {3: {2, 4}}


def test_a_ban_that_is_not_met_changes_nothing() -> None:
    plain, _ = run(Rig(), request([1, 2, 3], 20, seed=6))
    result, told = run(Rig(), request([1, 2, 3], 20, seed=6, banned_strings=("#nowhere#",)))
    assert (result.ids, result.text, result.stop_reason) == (plain.ids, plain.text, plain.stop_reason)
    assert told == plain.text


def test_events_tell_of_the_token_that_ends() -> None:
    ids = expected([9, 8], 20, seed=2)
    for ban in ((), ("#",)):
        asked = request([9, 8], 20, seed=2, stop_ids=frozenset({ids[3]}), banned_strings=ban)
        assert run(Rig(), asked)[0].ids == tuple(ids[: ids.index(ids[3]) + 1])  # `run` compares with the events


def test_a_stop_string_under_suspicion_of_a_longer_ban() -> None:
    ids = expected([9, 8], 20, seed=2)
    text = text_of(ids)
    stop = text[4:6]
    plain, _ = run(Rig(), request([9, 8], 20, seed=2, stop=(stop,)))
    for ban in (stop + "#", text[3:8] + "#", text[5:9] + "#"):
        result, told = run(Rig(), request([9, 8], 20, seed=2, stop=(stop,), banned_strings=(ban,)))
        assert (result.text, result.ids, result.stop_reason) == (plain.text, plain.ids, "stop")
        assert told == plain.text


def test_banning_everything_ends_with_words() -> None:
    rig = Rig(pages=64)
    letters = tuple({letter(token) for token in range(VOCAB)} - {"<eos>"})

    def no_end(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[EOS] = -torch.inf
        return logits

    with pytest.raises(UsageError, match="banned strings"):
        rig.generator.run([request([1], 30, banned_strings=letters, processors=(no_end,))])
    rig.check()


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.text("abAB", max_size=3), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_bans_whatever_the_pieces(strings: list[str], pieces: list[str]) -> None:
    bans, out = Bans(strings), []
    for count, piece in enumerate(pieces, 1):
        whole = fold("".join(pieces[:count]))
        starts = [at for string in strings if (at := whole.find(string)) >= 0]
        place = bans.push(piece)
        assert (place is not None) == bool(starts)
        if place is not None:
            index = len(out) + place
            assert len("".join(pieces[:index])) <= min(starts) < len("".join(pieces[:count]))
            return
        out += bans.release()
        assert out == pieces[: len(out)]
    assert out + bans.flush() == pieces


def test_folding_keeps_places() -> None:
    text = "AßİÉx"
    assert len(fold(text)) == len(text) and fold("ÉX") == "éx"


def test_loops() -> None:
    assert is_loop([9, 1, 2, 1, 2, 1, 2], 2, 3) and not is_loop([9, 1, 2, 1, 2, 1, 2], 2, 4)
    assert is_loop([7, 7, 7], 5, 3) and not is_loop([7, 7], 5, 3) and not is_loop([], 5, 3)
    assert not is_loop([1, 2, 3, 1, 2, 3], 2, 2) and is_loop([1, 2, 3, 1, 2, 3], 3, 2)


def test_a_reply_that_loops_ends() -> None:
    def round_and_round(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[:] = -torch.inf
        logits[len(ids) % 3] = 0.0
        return logits

    for speculate in ("off", "ngram"):
        asked = request([9, 9], 200, processors=(round_and_round,), stop_loop=(8, 5), speculate=speculate)
        result, _ = run(Rig(pages=64, context=256), asked)
        assert (result.stop_reason, len(result.ids)) == ("loop", 15)
        assert (result.accepted_tokens > 3) == (speculate == "ngram")


def test_processors_see_the_text_and_have_their_way() -> None:
    seen = []

    def odd(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(ids))
        assert torch.equal(logits, logits_of(ids))
        logits[::2] = -torch.inf
        return logits

    result, _ = run(knowing(Rig(), 0.5, random.Random(1)), request([1, 2], 9, processors=(odd,)))
    assert all(token % 2 for token in result.ids)
    assert seen == [[1, 2, *result.ids[:n]] for n in range(len(result.ids))]  # once per token, in order


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda ids, x: None, "gave NoneType"),
        (lambda ids, x: x[:3], r"gave shape \(3,\)"),
        (lambda ids, x: x + torch.nan, "NaN or infinity"),
        (lambda ids, x: torch.full_like(x, -torch.inf), "logit processors exclude all"),
    ],
)
def test_processors_that_go_wrong_fail_their_own_request(gives: object, words: str) -> None:
    rig = Rig()
    with pytest.raises(UsageError, match=words):
        rig.generator.run([request([1], processors=(gives,))])
    rig.check()


@pytest.mark.parametrize("budget", [3, 8, 100])
def test_scores_of_the_prompt(budget: int) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    rig = Rig(prefill_tokens=budget)
    run(rig, request(prompt, 3))
    result, _ = run(rig, request(prompt, 3, prompt_logprobs=2))
    assert result.ids == tuple(expected(prompt, 3)) and result.reused_tokens == 0
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(prompt)
    for place, told in enumerate(result.prompt_logprobs[1:], 1):
        exact = torch.log_softmax(logits_of(prompt[:place]).double(), dim=-1)
        assert told.id == prompt[place] and told.logprob == pytest.approx(float(exact[prompt[place]]), abs=1e-5)
        assert [pair[1] for pair in told.top] == pytest.approx(exact.topk(2).values.tolist(), abs=1e-5)
    assert run(rig, request([4], 2, prompt_logprobs=1))[0].prompt_logprobs == (None,)
    assert run(rig, request(prompt, 2))[0].prompt_logprobs is None


def led_away(prompt: list[int], negative: list[int], scale: float, count: int, seed: int) -> list[int]:
    """The definition, by log-probabilities after both prompts."""
    sampler = Rig().generator._intake._make_sampler(request(prompt, seed=seed), seed)
    ids: list[int] = []
    while len(ids) < count and EOS not in ids:
        with_it, against = (torch.log_softmax(logits_of([*start, *ids]), dim=-1) for start in (prompt, negative))
        ids.append(sampler.sample(against + scale * (with_it - against), prompt, ids).id)
    return ids


@pytest.mark.parametrize("negative", [[9], list(range(20))])
def test_guidance(negative: list[int]) -> None:
    rig = Rig(pages=40, prefill_tokens=8)
    wanted = {}
    for k in range(5):
        prompt = [k, 2, 3]
        asked = request(prompt, 12, seed=k, negative_prompt=tuple(negative), guidance=1.0 + k / 2) if k else None
        name = rig.generator.submit(asked or request(prompt, 12))
        wanted[name] = tuple(led_away(prompt, negative, 1.0 + k / 2, 12, k) if k else expected(prompt, 12))
    ends = {}
    while rig.generator.busy:
        ends |= {e.request_id: e.result for e in rig.generator.step() if isinstance(e, Finished)}
        rig.table.check()
    rig.check()
    assert {name: result.ids for name, result in ends.items()} == wanted
    assert wanted["request-2"] != tuple(expected([1, 2, 3], 12, seed=1))


def test_guidance_that_yields_and_is_taken_back() -> None:
    rig, wanted = Rig(pages=12, page_size=4, context=32), {}
    free = text_of(led_away([1, 1, 2], [7, 7], 2.0, 18, 1))
    for k in range(4):
        ban = (free[3:5],) if k == 1 else ()
        name = rig.generator.submit(
            request([k, 1, 2], 18, seed=k, negative_prompt=(7, 7), guidance=2.0, banned_strings=ban)
        )
        wanted[name] = tuple(led_away([k, 1, 2], [7, 7], 2.0, 18, k))
    ends = {}
    while rig.generator.busy:
        ends |= {e.request_id: e for e in rig.generator.step() if hasattr(e, "result") or hasattr(e, "error")}
        rig.table.check()
    rig.check()
    for name, ids in wanted.items():
        if isinstance(ends[name], Finished) and name != "request-2":
            assert ends[name].result.ids == ids
    assert isinstance(ends["request-1"], Finished)  # the first in rank always gets its pages
    with pytest.raises(Exception, match="negative prompt and the reply may be 35 tokens, the context holds 32"):
        rig.generator.submit(request([1], 33, negative_prompt=(7, 7), guidance=2.0))


def test_trim() -> None:
    assert "".join(map(Trim(" ti").push, ["", " t", "im", "e"])) == "me"
    assert "".join(map(Trim(" ti").push, ["tim", "e"])) == "me"
    assert "".join(map(Trim("x").push, ["ab", "c"])) == "abc"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"banned_strings": "abc"}, "banned_strings is 'abc'"),
        ({"banned_strings": ("",)}, "not empty"),
        ({"grammar": "a|b"}, "grammar is a str"),
        ({"prefix": 3}, "prefix is 3"),
        ({"prefix": "a", "heal": True}, "heal cannot be combined"),
        ({"stop_loop": (0, 3)}, "stop_loop"),
        ({"stop_loop": (3, 1)}, "stop_loop"),
        ({"processors": (3,)}, "not callable"),
        ({"guidance": 2.0}, "need each other"),
        ({"negative_prompt": (1,)}, "need each other"),
        ({"guidance": "2"}, "guidance is '2'"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        request([1], **settings)


def test_a_redrawn_token_uses_the_same_number() -> None:
    """The draw after a ban is the inverse distribution at the same quantile over what is left."""
    row = torch.tensor([1.0, 2.0, 3.0, -torch.inf]).numpy()
    assert inverse_cdf(row, 0.999) == 2

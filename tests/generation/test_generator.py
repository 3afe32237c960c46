"""The generator over a fake model in which every mistake of pages, slots, tables or lengths gives other text."""

import pytest
import torch
from fakes import EOS, VOCAB, FakeSpec, Rig, expected, logits_of, request, text_of

from exl_runtime.errors import PromptTooLong, UsageError
from exl_runtime.generation.request import Result
from exl_runtime.generation.stream import Finished, Prefilled, Started, Text


def run(rig: Rig, *requests: object) -> list[Result]:
    results = rig.generator.run(requests)
    rig.check()
    return results


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 17, 30])
def test_ids_and_text_are_those_of_the_oracle(length: int) -> None:
    prompt = [(7 * i) % 26 for i in range(length)]
    (result,) = run(Rig(), request(prompt, 12, seed=3))
    ids = expected(prompt, 12, seed=3)
    assert result.ids == tuple(ids) and result.generated_tokens == len(ids)
    assert result.text == text_of(ids)
    assert result.stop_reason == ("eos" if ids[-1] == EOS else "length")
    assert (result.prompt_tokens, result.reused_tokens) == (length, 0)
    assert result.logprobs is None


def test_chunked_prefill_gives_the_same() -> None:
    prompt = list(range(23))
    results = [run(Rig(prefill_tokens=budget), request(prompt))[0] for budget in (1, 2, 3, 5, 8, 100)]
    assert {result.ids for result in results} == {tuple(expected(prompt, 8))}


def test_same_seed_same_tokens_whatever_the_batch() -> None:
    prompts = [[(i * k) % 26 for i in range(1, k + 2)] for k in range(1, 12)]
    requests = [request(prompt, 5 + k, seed=k % 3) for k, prompt in enumerate(prompts)]
    wanted = [tuple(expected(prompt, 5 + k, seed=k % 3)) for k, prompt in enumerate(prompts)]
    for rig in (Rig(pages=64), Rig(pages=64, max_running=2), Rig(pages=8), Rig(pages=64, prefill_tokens=3)):
        assert [result.ids for result in run(rig, *requests)] == wanted
    rig = Rig(pages=64)
    alone = [run(rig, one)[0].ids for one in reversed(requests)]
    assert alone[::-1] == wanted


def test_events_tell_the_whole_story() -> None:
    rig = Rig()
    events = list(rig.generator.stream(request([1, 2, 3], 10, seed=5, logprobs=2, id="me")))
    assert isinstance(events[0], Started) and events[0] == Started("me", 3, 0)
    assert isinstance(events[1], Prefilled)
    assert isinstance(events[-1], Finished)
    result = events[-1].result
    texts = [event for event in events if isinstance(event, Text)]
    assert "".join(event.text for event in texts) == result.text
    assert sum((event.ids for event in texts), ()) == result.ids == tuple(expected([1, 2, 3], 10, seed=5))
    assert sum((event.logprobs for event in texts), ()) == result.logprobs
    assert all(event.text or event.ids for event in texts)
    assert all(event.request_id == "me" for event in events)
    history = [1, 2, 3]
    for token, told in zip(result.ids, result.logprobs, strict=True):
        exact = torch.log_softmax(logits_of(history).double(), dim=-1)
        assert told.id == token and told.logprob == pytest.approx(float(exact[token]))
        assert [pair[1] for pair in told.top] == pytest.approx(exact.topk(2).values.tolist())
        history.append(token)


def test_stop_string_and_stop_id() -> None:
    ids = expected([9, 8], 20, seed=2)
    text = text_of(ids)
    stop = text[4:6]
    (result,) = run(Rig(), request([9, 8], 20, seed=2, stop=(stop, "#")))
    assert result.stop_reason == "stop" and result.text == text[: text.index(stop)]
    assert result.ids == tuple(ids[: len(result.ids)]) and len(result.ids) >= 6
    (result,) = run(Rig(), request([9, 8], 20, seed=2, stop_ids=frozenset({ids[3]})))
    assert result.stop_reason == "stop" and result.ids == tuple(ids[: ids.index(ids[3]) + 1])
    assert result.text == text_of(result.ids[:-1])


def test_every_end_of_sequence_id_ends_and_stays_out_of_the_text() -> None:
    ids = expected([4], 9)
    rig = Rig(spec=FakeSpec(eos_ids=(EOS, ids[5])))
    (result,) = run(rig, request([4], 9))
    assert result.stop_reason == "eos" and result.ids == tuple(ids[: ids.index(ids[5]) + 1])
    assert result.text == text_of(result.ids[:-1])


def test_without_ids_in_the_config_the_tokenizer_names_the_end() -> None:
    rig = Rig(spec=FakeSpec(eos_ids=()))
    assert rig.generator._intake.eos_ids == {EOS}


def test_context_end() -> None:
    (result,) = run(Rig(context=10), request([1, 2, 3], None, seed=1))
    assert result.stop_reason == "context"
    assert result.ids == tuple(expected([1, 2, 3], 7, seed=1))
    (result,) = run(Rig(context=10), request(range(9), None, seed=1))
    assert (result.stop_reason, result.generated_tokens) == ("context", 1)


def test_refusals_at_submission() -> None:
    rig = Rig(context=10)
    with pytest.raises(PromptTooLong, match=r"prompt is 10 tokens, the context holds 10") as caught:
        rig.generator.submit(request(range(10)))
    assert "--overflow" in str(caught.value)
    for bad in (-1, VOCAB):
        with pytest.raises(UsageError, match=f"token id {bad}"):
            rig.generator.submit(request([1, bad]))
    rig.generator.submit(request([1], id="a"))
    with pytest.raises(UsageError, match="'a' is still running"):
        rig.generator.submit(request([1], id="a"))
    with pytest.raises(UsageError, match="64 tokens was asked for, the key/value cache holds 16"):
        Rig(pages=4, context=64)
    with pytest.raises(PromptTooLong):
        list(rig.generator.stream(request([1]), request(range(10))))
    assert list(rig.generator._live) == ["a"]


def test_rope_length_reaches_the_model_and_parts_the_cache() -> None:
    spec = FakeSpec(rope_switch=12)
    rig = Rig(spec=spec)
    prompt = list(range(9))
    short, long = request(prompt, 3), request(prompt, 5)
    assert run(rig, short)[0].ids == tuple(expected(prompt, 3))
    (result,) = run(rig, long)
    assert result.ids == tuple(expected(prompt, 5, rope_length=14)) and result.reused_tokens == 0
    (result,) = run(rig, request(prompt, 2))
    assert result.reused_tokens == 8
    both = run(Rig(spec=spec), short, long)
    assert [result.ids for result in both] == [
        tuple(expected(prompt, 3)),
        tuple(expected(prompt, 5, rope_length=14)),
    ]


def test_logits_of_a_text() -> None:
    rig = Rig(prefill_tokens=5)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
    logits = rig.generator.logits(tokens)
    assert torch.equal(logits, torch.stack([logits_of(tokens[: i + 1]) for i in range(len(tokens))]))
    assert not logits.is_inference()
    rig.check()
    with pytest.raises(PromptTooLong):
        rig.generator.logits(range(65))


@pytest.mark.parametrize("first", [0, 3, 5, 11, 12])
def test_logits_in_parts(first: int) -> None:
    rig = Rig(prefill_tokens=5)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
    seen: list[tuple[int, torch.Tensor]] = []
    rig.generator.each_logits(tokens, lambda position, rows: seen.append((position, rows.clone())), first=first)
    assert [position for position, _ in seen] == [max(first, start) for start in (0, 5, 10) if start + 5 > first]
    assert torch.equal(torch.cat([rows for _, rows in seen]), rig.generator.logits(tokens)[first:])
    with pytest.raises(ZeroDivisionError):
        rig.generator.each_logits(tokens, lambda position, rows: 1 // 0)
    rig.check()  # no page is lost


def test_timings() -> None:
    rig = Rig()

    def tick(batch: object) -> None:
        rig.clock.now += 1.0

    rig.model.before = tick
    rig.generator.submit(request(range(20), 4, id="x"))
    events = []
    while rig.generator.busy:
        events += rig.generator.step()
    result = events[-1].result
    assert result.seconds_prefill == 3.0 and result.seconds_decode == 3.0  # 20 tokens, 8 a step; then 3 more tokens
    assert next(event.seconds for event in events if isinstance(event, Prefilled)) == 3.0
    assert rig.generator.step() == []


def test_stats() -> None:
    rig = Rig()
    run(rig, request(range(6), 3), request(range(6), 3))
    stats = rig.generator.stats
    assert (stats.requests, stats.prompt_tokens, stats.generated_tokens) == (2, 12, 6)
    assert stats.reused_tokens == 5  # the second waited for the first one's prompt
    assert stats.pages_held == stats.waiting == stats.running == 0 < stats.pages_idle
    rig.generator.forget()
    assert rig.generator.stats.pages_idle == 0

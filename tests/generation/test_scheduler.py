"""Who runs when: budget, fairness, rank, yielding. The fake model makes sure that nothing of it changes a token."""

from dataclasses import replace

import pytest
from fakes import Rig, expected, request

from exl_runtime.cache.pages import PageTable
from exl_runtime.errors import CacheFull
from exl_runtime.generation.request import RequestState
from exl_runtime.generation.scheduler import Scheduler
from exl_runtime.generation.sequence import Sequence
from exl_runtime.generation.stream import Failed, Finished, Started, Text


def drain(rig: Rig) -> list[object]:
    events = []
    while rig.generator.busy:
        events += rig.generator.step()
        rig.table.check()
    rig.check()
    return events


def results(events: list[object]) -> dict[str, tuple[int, ...]]:
    return {event.request_id: event.result.ids for event in events if isinstance(event, Finished)}


def sequence(tokens: list[int], order: int = 1, priority: int = 0) -> Sequence:
    nothing = dict.fromkeys(("sampler", "detokenizer", "stop_ids", "stop_text"))
    one = replace(request(tokens, id=str(order)), priority=priority)
    return Sequence(request=one, order=order, tokens=tokens, root=b"", rope_length=0, limit=9, submitted=0, **nothing)


def finish_step(scheduler: Scheduler, step: object) -> None:
    """As if the model had run and drawn token 1 everywhere."""
    for chunk in step.chunks:
        scheduler.settle(chunk.sequence)
        done = chunk.wants_logits
        scheduler.commit(chunk)
        if done:
            chunk.sequence.tokens.append(1)
            if chunk.sequence.state is RequestState.PREFILL:
                chunk.sequence.move(RequestState.DECODE)


def test_a_long_prompt_never_stops_a_reply() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=10)
    short, long = sequence([1, 2, 3], 1), sequence(list(range(100, 165)), 2)
    scheduler.add(short)
    finish_step(scheduler, scheduler.schedule())
    scheduler.add(long)
    taken = []
    while long.state is not RequestState.DECODE:
        step = scheduler.schedule()
        assert step.decode == (short,)
        assert sum(chunk.stop - chunk.start for chunk in step.chunks) <= 10
        taken += [chunk.stop - chunk.start for chunk in step.prefill]
        finish_step(scheduler, step)
    assert taken == [9] * 7 + [2]
    assert short.kv_length == 3 + 8


def test_budget_is_shared_in_order_and_requests_join_at_any_step() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=10)
    first, second, third = sequence([1] * 6, 1), sequence([2] * 6, 2), sequence([3] * 6, 3)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert [(c.sequence, c.start, c.stop) for c in step.prefill] == [(first, 0, 6), (second, 0, 4)]
    finish_step(scheduler, step)
    scheduler.add(third)
    step = scheduler.schedule()
    assert step.decode == (first,)
    assert [(c.sequence, c.start, c.stop) for c in step.prefill] == [(second, 4, 6), (third, 0, 6)]


def test_decodes_beyond_the_budget_still_leave_a_token_for_prompts() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=2)
    for order in range(4):
        scheduler.add(sequence([order], order))
    for _ in range(3):
        finish_step(scheduler, scheduler.schedule())
    scheduler.add(sequence([9, 9], 9))
    step = scheduler.schedule()
    assert len(step.decode) == 4 and [(c.start, c.stop) for c in step.prefill] == [(0, 1)]


def test_priority_goes_first() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=4, max_running=2)
    plain, urgent, also = sequence([1], 1), sequence([2], 2, priority=5), sequence([3], 3)
    for one in (plain, urgent, also):
        scheduler.add(one)
    assert scheduler.schedule().admitted == (urgent, plain)
    assert scheduler.waiting == [also]


def test_short_of_pages_requests_wait_in_line() -> None:
    scheduler = Scheduler(PageTable(4, page_size=4), prefill_tokens=100)
    first, second, third = sequence([1] * 9, 1), sequence([2] * 9, 2), sequence([3], 3)
    for one in (first, second, third):
        scheduler.add(one)
    assert scheduler.schedule().admitted == (first,)
    for _ in range(3):
        assert scheduler.schedule().admitted == ()  # the third does not overtake the second
    scheduler.remove(first, RequestState.FINISHED)
    assert scheduler.schedule().admitted == (second, third)


def test_the_lowest_rank_yields_and_comes_back() -> None:
    table = PageTable(4, page_size=4)
    scheduler = Scheduler(table, prefill_tokens=100)
    old, young = sequence([1] * 7, 1), sequence([2] * 7, 2)
    scheduler.add(old)
    scheduler.add(young)
    finish_step(scheduler, scheduler.schedule())
    while not (step := scheduler.schedule()).preempted:
        finish_step(scheduler, step)
    assert step.preempted == (young,) and step.decode == (old,)
    assert young.state is RequestState.QUEUED and young.pages == []
    finish_step(scheduler, step)
    assert scheduler.schedule().admitted == ()
    scheduler.remove(old, RequestState.FINISHED)
    step = scheduler.schedule()
    assert step.admitted == (young,)
    assert [(c.start, c.stop) for c in step.prefill] == [(4, len(young.tokens))]  # its first page is still there
    table.check()


def test_a_sequence_larger_than_the_cache_is_stuck_not_waiting_for_ever() -> None:
    table = PageTable(2, page_size=4)
    scheduler = Scheduler(table, prefill_tokens=100)
    huge, grows = sequence([1] * 9, 1), sequence([2] * 8, 2)
    scheduler.add(huge)
    assert scheduler.schedule().stuck == (huge,)
    scheduler.remove(huge, RequestState.FAILED)
    scheduler.add(grows)
    finish_step(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    assert step.stuck == (grows,) and step.chunks == ()


def test_the_generator_ends_what_is_stuck() -> None:
    rig = Rig(pages=3, page_size=4, context=12)
    rig.generator._engine._context = 1000  # as if somebody had promised more than the cache holds
    rig.generator.submit(request(range(5), 50, seed=1, id="grows"))
    events = drain(rig)
    assert events[-1].result.stop_reason == "context" and len(events[-1].result.ids) == 8
    rig.generator._intake.context = 1000
    rig.generator.submit(request(range(20), id="huge"))
    (failed,) = drain(rig)
    assert isinstance(failed, Failed) and isinstance(failed.error, CacheFull)
    assert "20 tokens, the whole key/value cache holds 12" in str(failed.error)


@pytest.mark.parametrize("pages", [8, 10, 13])
def test_yielding_changes_no_token(pages: int) -> None:
    rig = Rig(pages=pages, page_size=4, context=32)
    wanted = {}
    for k in range(6):
        prompt = [k, *range(4 + k)]
        rig.generator.submit(request(prompt, 20, seed=k, id=str(k)))
        wanted[str(k)] = tuple(expected(prompt, 20, seed=k))
    events = drain(rig)
    assert results(events) == wanted
    assert rig.generator.stats.preemptions > 0
    starts = [event.request_id for event in events if isinstance(event, Started)]
    assert sorted(starts) == sorted(wanted)  # told once, however often it starts over
    for name, ids in wanted.items():
        assert sum((e.ids for e in events if isinstance(e, Text) and e.request_id == name), ()) == ids


def test_the_highest_rank_is_never_interrupted() -> None:
    rig = Rig(pages=8, page_size=4, context=32)
    for k in range(5):
        rig.generator.submit(replace(request([k, 1, 2], 24, seed=3, id=str(k)), priority=int(k == 3)))
    first_pass = {}
    while rig.generator.busy:
        rig.generator.step()
        live = rig.generator._live.get("3")
        if live is not None and live.started is not None:
            assert live.state is RequestState.DECODE
            first_pass["3"] = True
    assert first_pass
    rig.check()


def test_a_follower_does_not_wait_for_the_rest_of_a_long_prompt() -> None:
    rig = Rig(pages=64, prefill_tokens=8)
    rig.generator.submit(request([*range(8), *range(20, 26), *[3] * 60], 4, id="long"))
    rig.generator.submit(request([*range(8), 9, 9], 4, id="short"))
    started = {}
    for number in range(20):
        for event in rig.generator.step():
            if isinstance(event, Started):
                started[event.request_id] = (number, event.reused_tokens)
    assert started["short"] == (1, 8)  # as soon as what it shares is there
    drain(rig)


def test_nobody_follows_a_prompt_with_another_rope() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=100)
    first, second, third = (sequence([1] * 9, order) for order in (1, 2, 3))
    second.root = b"other"
    for one in (first, second, third):
        scheduler.add(one)
    assert scheduler.schedule().admitted == (first, second)


def test_a_long_prompt_leaves_room_for_a_short_one() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=16)
    long, short, next_one = sequence([1] * 99, 1), sequence([2] * 6, 2), sequence([3] * 99, 3)
    scheduler.add(long)
    finish_step(scheduler, scheduler.schedule())
    assert long.kv_length == 16
    scheduler.add(short)
    step = scheduler.schedule()
    assert [(c.sequence, c.stop - c.start) for c in step.prefill] == [(long, 10), (short, 6)]
    finish_step(scheduler, step)
    scheduler.add(next_one)
    step = scheduler.schedule()
    assert [(c.sequence, c.stop - c.start) for c in step.prefill] == [(long, 11), (next_one, 4)]
    assert step.decode == (short,)


def test_a_higher_priority_overtakes_a_running_prompt() -> None:
    scheduler = Scheduler(PageTable(100, page_size=4), prefill_tokens=8)
    plain, urgent = sequence([1] * 99, 1), sequence([2] * 8, 2, priority=1)
    scheduler.add(plain)
    finish_step(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    step = scheduler.schedule()
    assert [(c.sequence, c.stop) for c in step.prefill] == [(urgent, 8)]


def test_a_page_that_another_sequence_sealed_first_is_taken_over() -> None:
    table = PageTable(100, page_size=4)
    scheduler = Scheduler(table, prefill_tokens=100)
    first, second = sequence([1, 2, 3], 1), sequence([1, 2, 3], 2)
    for one in (first, second):
        scheduler.add(one)
        one.tokens = list(one.tokens)
        finish_step(scheduler, scheduler.schedule())
    assert first.pages[0] != second.pages[0]
    version = second.version
    finish_step(scheduler, scheduler.schedule())
    assert first.pages[0] == second.pages[0] and second.version > version
    table.check()

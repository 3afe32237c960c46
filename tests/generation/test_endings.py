"""Requests that end early: cancelled, late, failed, abandoned. Pages return, neighbours go on."""

import gc
import random
import threading

import pytest
import torch
from fakes import Rig, expected, request, text_of

from exl_runtime.errors import NonFiniteError
from exl_runtime.generation.request import RequestState
from exl_runtime.generation.stream import Failed, Finished, Text


def drain(rig: Rig, tick: float = 0.0) -> dict[str, object]:
    """Step until everything has ended, the clock going on by `tick` before each; results and errors by id."""
    ends = {}
    while rig.generator.busy:
        rig.clock.now += tick
        for event in rig.generator.step():
            if isinstance(event, Finished):
                ends[event.request_id] = event.result
            elif isinstance(event, Failed):
                ends[event.request_id] = event.error
        rig.table.check()
    rig.check()
    return ends


@pytest.mark.parametrize("steps", range(8))
def test_cancel_in_every_state(steps: int) -> None:
    rig = Rig(max_running=1)
    prompt = list(range(20))
    rig.generator.submit(request(prompt, 30, seed=2, id="it"))
    rig.generator.submit(request([5], 3, id="next"))
    for _ in range(steps):
        rig.generator.step()
    states = {0: RequestState.QUEUED, 1: RequestState.PREFILL, 4: RequestState.DECODE}
    if steps in states:
        assert rig.generator._live["it"].state is states[steps]
    assert rig.generator.cancel("it")
    ends = drain(rig)
    done = max(0, steps - 2)
    assert ends["it"].stop_reason == "cancelled"
    assert ends["it"].ids == tuple(expected(prompt, 30, seed=2)[:done])
    assert ends["it"].text == text_of(ends["it"].ids)  # what was held back is there too
    assert ends["next"].ids == tuple(expected([5], 3))
    assert not rig.generator.cancel("it") and not rig.generator.cancel("never")


def test_cancel_keeps_the_work_for_later() -> None:
    rig = Rig()
    rig.generator.submit(request(range(20), 30, id="it"))
    rig.generator.step()
    rig.generator.step()
    rig.generator.cancel("it")
    drain(rig)
    assert rig.generator.run([request(range(20), 1)])[0].reused_tokens == 16


def test_deadline() -> None:
    rig = Rig(max_running=1)
    rig.generator.submit(request([1, 2], 50, seed=6, id="late", deadline=5.0))
    rig.generator.submit(request([3], 3, id="waits", deadline=5.0))
    rig.generator.submit(request([4], 3, id="free"))
    ends = drain(rig, tick=1.0)
    assert ends["late"].stop_reason == ends["waits"].stop_reason == "deadline"
    assert ends["late"].ids == tuple(expected([1, 2], 50, seed=6)[:4]) and ends["waits"].ids == ()
    assert ends["free"].ids == tuple(expected([4], 3))


def test_a_request_that_breaks_the_model_fails_alone() -> None:
    rig = Rig(pages=32)

    def fail_on_25(batch: object) -> None:
        if 25 in batch.tokens[batch.q_starts[:-1].long()].tolist():
            raise RuntimeError("kernel exploded")

    for k in range(5):
        rig.generator.submit(request([25, 1, 2] if k == 2 else [k, 1, 2], 10, seed=2 * k, id=str(k)))
    rig.model.before = fail_on_25
    wanted = {}
    for k in (0, 1, 3, 4):
        ids = expected([k, 1, 2], 10, seed=2 * k)
        wanted[str(k)] = None if 25 in ids[:-1] else tuple(ids)
    ends = drain(rig)
    assert isinstance(ends["2"], RuntimeError) and str(ends["2"]) == "kernel exploded"
    for name, ids in wanted.items():
        assert isinstance(ends[name], RuntimeError) if ids is None else ends[name].ids == ids
    assert any(wanted.values())


def test_stream_raises_the_error_to_its_owner_and_spares_the_rest() -> None:
    rig = Rig(pages=32)
    rig.generator.submit(request([7, 7], 6, id="other"))

    def fail_on_25(batch: object) -> None:
        if 25 in batch.tokens.tolist() and len(batch.tokens) > 1:
            raise MemoryError("no room")

    rig.model.before = fail_on_25
    with pytest.raises(MemoryError, match="no room"):
        list(rig.generator.stream(request([1, 2, 3], 40, seed=6, id="mate"), request([25, 24], 5)))
    assert list(rig.generator._live) in (["other"], [])  # the mate was cancelled with it
    rig.model.before = lambda batch: None
    drain(rig)


def test_what_a_failed_request_computed_is_not_found() -> None:
    rig = Rig()
    rig.generator.run([request(range(6), 1)])
    rig.generator.submit(request(range(18), 5, id="it"))
    rig.generator.step()

    def fail(batch: object) -> None:
        raise RuntimeError

    rig.model.before = fail
    drain(rig)
    rig.model.before = lambda batch: None
    # what was cached before stays; of the failed prompt's own pages nothing does
    assert rig.generator.run([request(range(18), 1)])[0].reused_tokens in (4, 6)


def test_non_finite_logits_name_request_and_position() -> None:
    rig = Rig(pages=32)
    forward = rig.model.forward

    def spoil(batch: object, kv: object) -> torch.Tensor:
        logits = forward(batch, kv)
        for row, position in enumerate(batch.positions[batch.logit_rows].tolist()):
            if position == 4:
                logits[row, 9] = float("nan")
        return logits

    rig.model.forward = spoil
    rig.generator.submit(request([1, 2, 3, 4, 5], 5, id="bad"))
    rig.generator.submit(request([1, 2], 2, id="good"))
    ends = drain(rig)
    assert isinstance(ends["bad"], NonFiniteError)
    assert "request bad: 1 of 32 logits for position 5" in str(ends["bad"]) and "token 9" in str(ends["bad"])
    assert ends["good"].ids == tuple(expected([1, 2], 2))


def test_large_finite_logits_are_fine() -> None:
    rig = Rig()
    rig.model.forward = lambda batch, kv: torch.full((len(batch.logit_rows), 32), 3e38)
    assert rig.generator.run([request([1], 1)])[0].generated_tokens == 1


def test_the_models_own_complaint_is_placed() -> None:
    rig = Rig()

    def complain(batch: object) -> None:
        raise NonFiniteError("layer 3 gives NaN", hint="look there")

    rig.model.before = complain
    with pytest.raises(NonFiniteError, match=r"request me, positions 0 to 1: layer 3 gives NaN\n  hint: look there"):
        rig.generator.run([request([1, 2], id="me")])
    rig.check()


@pytest.mark.parametrize("place", ["sampler", "detokenizer", "copy"])
def test_failures_beside_the_model(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(pages=32)
    rig.generator.run([request([1, 2, 3, 4, 5, 6], 1)])

    def fail(*args: object) -> None:
        raise ValueError(place)

    rig.generator.submit(request([1, 2, 3, 4, 5, 9], 5, id="bad"))
    rig.generator.submit(request([8, 8], 5, id="good"))
    bad = rig.generator._live["bad"]
    if place == "sampler":
        monkeypatch.setattr(bad.sampler, "sample", fail)
    elif place == "detokenizer":
        monkeypatch.setattr(bad.detokenizer, "push", fail)
    else:
        monkeypatch.setattr(rig.kv, "copy_page", fail)
    ends = drain(rig)
    assert isinstance(ends["bad"], ValueError) and str(ends["bad"]) == place
    assert ends["good"].ids == tuple(expected([8, 8], 5))


def test_an_interrupted_step_can_be_repeated() -> None:
    for at in range(1, 9):
        rig = Rig()
        rig.generator.run([request(range(7), 1)])
        rig.generator.submit(request([*range(6), 20, *range(9)], 4, seed=3, id="it"))
        passes = iter(range(1, 100))

        def interrupt(batch: object, passes: object = passes, at: int = at) -> None:
            if next(passes) == at:
                raise KeyboardInterrupt

        rig.model.before = interrupt
        ends = {}
        while rig.generator.busy:
            try:
                ends |= {event.request_id: event for event in rig.generator.step()}
            except KeyboardInterrupt:
                rig.table.check()
        assert ends["it"].result.ids == tuple(expected([*range(6), 20, *range(9)], 4, seed=3))
        rig.check()


def test_an_interrupted_copy_leaves_nothing_wrong_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.generator.run([request([1, 2, 3, 4, 5, 6, 7], 1)])
    rig.generator.submit(request([1, 2, 3, 4, 5, 6, 9], 1, id="it"))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rig.kv, "copy_page", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rig.generator.step()
    rig.generator.cancel("it")
    drain(rig)
    (result,) = rig.generator.run([request([1, 2, 3, 4, 5, 6, 9], 4)])
    assert result.reused_tokens == 6 and result.ids == tuple(expected([1, 2, 3, 4, 5, 6, 9], 4))
    rig.check()


def test_leaving_a_stream_returns_the_pages_at_once() -> None:
    rig = Rig()
    stream = rig.generator.stream(request(range(10), 30, seed=6), request([4], 30, seed=6))
    for event in stream:
        if isinstance(event, Text):
            break
    assert rig.table.available < rig.pages
    stream.close()
    assert not rig.generator.busy and not rig.generator._boxes
    rig.check()
    unused = rig.generator.stream(request([1]))
    del unused
    gc.collect()
    assert not rig.generator.busy


def test_two_hundred_mixed_requests_with_random_cancels() -> None:
    chance = random.Random(5)
    rig = Rig(pages=24, page_size=4, context=48, prefill_tokens=16)
    wanted, cancelled, ends, submitted = {}, set(), {}, 0
    while submitted < 200 or rig.generator.busy:
        for _ in range(chance.randrange(3)):
            if submitted < 200:
                length, count, seed = chance.randint(1, 30), chance.randint(1, 16), chance.randrange(5)
                prompt = [0] * chance.randrange(length) if length > 8 else []
                prompt += [chance.randrange(2) for _ in range(length - len(prompt))]
                name = rig.generator.submit(request(prompt, count, seed=seed, priority=chance.randrange(2)))
                wanted[name] = tuple(expected(prompt, count, seed=seed))
                submitted += 1
        if chance.random() < 0.15 and rig.generator._live:
            name = chance.choice(list(rig.generator._live))
            assert rig.generator.cancel(name)
            cancelled.add(name)
        for event in rig.generator.step():
            if isinstance(event, Finished):
                ends[event.request_id] = event.result
        rig.table.check()
    rig.check()
    assert set(ends) == set(wanted) and len(cancelled) > 10
    for name, result in ends.items():
        if result.stop_reason == "cancelled":
            assert name in cancelled and result.ids == wanted[name][: len(result.ids)]
        else:
            assert result.ids == wanted[name]
    stats = rig.generator.stats
    assert stats.requests == 200 and stats.reused_tokens > 500 and stats.preemptions > 0


def test_threads_stream_and_leave_at_will() -> None:
    rig = Rig(pages=32, context=64)
    problems = []

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            for turn in range(8):
                prompt = [chance.randrange(3) for _ in range(chance.randint(1, 12))]
                ids, leave = (), chance.random() < 0.3
                for event in rig.generator.stream(request(prompt, 6, seed=turn)):
                    if isinstance(event, Text):
                        ids += event.ids
                        if leave:
                            break
                wanted = tuple(expected(prompt, 6, seed=turn))
                if ids != (wanted[: len(ids)] if leave else wanted):
                    problems.append((number, turn, ids, wanted))
        except Exception as err:
            problems.append(err)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems and not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert not rig.generator.busy and not rig.generator._boxes
    rig.check()


def test_cancel_from_another_thread() -> None:
    rig = Rig(context=64)
    started = threading.Event()
    rig.model.before = lambda batch: started.set()
    stopper = threading.Thread(target=lambda: (started.wait(10), rig.generator.cancel("it")))
    stopper.start()
    (result,) = rig.generator.run([request([1, 2], 40, seed=6, id="it")])
    stopper.join(10)
    assert result.stop_reason in ("cancelled", "eos", "length")
    assert result.ids == tuple(expected([1, 2], 40, seed=6)[: len(result.ids)])
    rig.check()

"""Passes that run one ahead on the CPU: nobody can tell, but by the clock."""

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import exl_runtime as exl
from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.cache.storage import KVStorage
from exl_runtime.checkpoint.threads import usable_processors
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request
from exl_runtime.generation.stream import Failed, Finished
from exl_runtime.ops import native
from exl_runtime.runtime import Runtime

pytestmark = pytest.mark.usefixtures("room_ahead")
STORY = "Once upon a time"
FOX = "The little fox and the little fox and the"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]  # answered within 40 tokens
ENDLESS = {"temperature": 1.0, "min_p": 0.05, "seed": 4, "ignore_eos": True}


def counts(rt: Runtime) -> tuple[int, int]:
    """Passes that ran ahead: wanted, halted."""
    step = rt._engine().model.step
    assert step is not None
    return step.program.ahead


def both_ways(use: Callable[[Runtime], object], **settings: object) -> tuple[int, int]:
    """`use` gives the same with and without passes that run ahead; how many were wanted and halted."""
    found = []
    for ahead in (True, False):
        with exl.load("demo", **{"context": 512, "speculate": "off", **settings}) as rt:
            rt._engine().model.runs_ahead = ahead
            found.append(use(rt))
            if ahead:
                many = counts(rt)
            else:
                assert counts(rt) == (0, 0)
    assert found[0] == found[1]
    return many


def told(result: exl.Result) -> tuple[object, ...]:
    return result.ids, result.text, result.stop_reason, result.reused_tokens, result.generated_tokens


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 1.2, "min_p": 0.02, "seed": 5, "banned_tokens": (300, 12)},
        {"temperature": 0.9, "seed": 6, "min_tokens": 20},
        {"temperature": 0, "frequency_penalty": 0.3},  # looks at the logits: nothing runs ahead
    ],
    ids=str,
)
def test_replies_are_the_same(sampling) -> None:
    params = exl.SamplingParams(**sampling)

    def use(rt: Runtime) -> object:
        alone = [rt.generate(prompt, max_tokens=40, sampling=params) for prompt in (STORY, QUESTION)]
        together = rt.generate([STORY, FOX, "A"], max_tokens=33, sampling=params)
        return [told(result) for result in [*alone, *together]]

    wanted, halted = both_ways(use)
    if "frequency_penalty" in sampling:
        assert (wanted, halted) == (0, 0)
    else:
        assert wanted > 60 and halted <= 3  # a batch that one leaves by its end token has none under way


def test_every_step_but_the_first_two_was_begun_before_it_was_asked_for() -> None:
    def use(rt: Runtime) -> object:
        return told(rt.generate(STORY, max_tokens=100, sampling=exl.SamplingParams(**ENDLESS)))

    # The prompt, and the step behind it. Nothing is begun behind the last.
    assert both_ways(use) == (98, 0)


def test_replies_that_end_otherwise_waste_one_pass() -> None:
    params = exl.SamplingParams(temperature=0)

    def use(rt: Runtime) -> object:
        found = [
            told(rt.generate(STORY, max_tokens=60, sampling=params, stop=[stop])) for stop in (" girl", "One", "tree")
        ]
        return [*found, told(rt.generate(QUESTION, max_tokens=60, sampling=params))]

    wanted, halted = both_ways(use)
    assert wanted > 5 and halted == 3  # none for the end token


def test_samples_guesses_and_what_comes_between(demo) -> None:
    params = exl.SamplingParams(temperature=0.8, seed=3)

    def use(rt: Runtime) -> object:
        found: list[object] = [told(result) for result in rt.generate(STORY, n=4, max_tokens=30, sampling=params)]
        found += [told(rt.generate(FOX, max_tokens=60, sampling=params, speculate="ngram"))]
        for number, event in enumerate(rt.stream(STORY, max_tokens=40, sampling=params)):
            found.append(getattr(event, "text", None))
            if number == 5:  # while the pass behind this event is under way
                found.append(told(rt.generate(QUESTION, max_tokens=10, sampling=params)))
            if number == 9:
                found.append(rt.logits([1, 5, 9, 4]).tolist())
            if number == 12:
                rt._engine().forget()
        return found

    wanted, halted = both_ways(use)
    assert wanted > 60 and halted >= 3


def test_a_context_that_rolls_and_one_that_ends() -> None:
    params = exl.SamplingParams(**ENDLESS)

    def use(rt: Runtime) -> object:
        rolled = rt.generate(STORY, max_tokens=900, sampling=params, overflow="window")
        ended = rt.generate(STORY, max_tokens=900, sampling=params, overflow="drop")
        assert rolled.dropped_tokens > 0 and ended.stop_reason == "context"
        return told(rolled), told(ended)

    wanted, halted = both_ways(use, context=768)
    assert wanted > 1600 and halted == 0


def test_sequences_that_yield_their_pages() -> None:
    preempted = []

    def use(rt: Runtime) -> object:
        engine = rt._engine()
        kv = KVStorage(engine.kv.geometry, 4, engine.kv.device)
        small = Generator(engine.model, kv, rt.tokenizer, context=4 * PAGE_SIZE)
        params = exl.SamplingParams(**ENDLESS)
        ask = [Request(prompt=(1, 5 + number), sampling=params, max_tokens=400, speculate="off") for number in range(3)]
        results = small.run(ask)
        preempted.append(small.stats.preemptions)
        return [told(result) for result in results]

    wanted, _ = both_ways(use)
    assert min(preempted) > 0 and wanted > 200


def test_those_who_wait_for_others_to_end_disturb_nobody() -> None:
    def use(rt: Runtime) -> object:
        engine, params = rt._engine(), exl.SamplingParams(**ENDLESS)
        kv = KVStorage(engine.kv.geometry, 2, engine.kv.device)
        found = []
        for most in ({"max_running": 1}, {}):  # no room for another one; no page for another one
            small = Generator(engine.model, kv, rt.tokenizer, context=2 * PAGE_SIZE, **most)
            ask = [Request(prompt=(5, number) * 140, sampling=params, max_tokens=40) for number in range(3, 6)]
            found += [told(result) for result in small.run(ask)]
        return found

    wanted, _ = both_ways(use)
    assert wanted >= 2 * 3 * 38


def play(rt: Runtime, seed: int) -> dict[str, object]:
    """Requests of all kinds that come, go and yield their pages; what came of each."""
    rng, engine = random.Random(seed), rt._engine()
    kv = KVStorage(engine.kv.geometry, rng.choice([4, 5, 7]), engine.kv.device)
    generator = Generator(engine.model, kv, rt.tokenizer, context=3 * PAGE_SIZE)
    found: dict[str, object] = {}
    live: list[str] = []
    for step in range(500):
        if rng.random() < 0.03 and len(live) < 5:
            params = exl.SamplingParams(
                temperature=rng.choice([0, 0.9]),
                min_p=rng.choice([0, 0.05]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.1]),
                seed=rng.randrange(99),
                ignore_eos=rng.random() < 0.7,
            )
            request = Request(
                prompt=tuple(rt.tokenizer.encode(rng.choice([STORY, FOX, "What is"])) * rng.choice([1, 1, 8, 40])),
                sampling=params,
                max_tokens=rng.choice([5, 40, 300]),
                stop=rng.choice([(), (), ("the",)]),
                overflow=rng.choice(["error", "window"]),
                speculate=rng.choice(["off", "ngram"]),
                priority=rng.choice([0, 0, 1]),
                banned_strings=rng.choice([(), (), ("little",)]),
            )
            live.append(generator.submit(request))
        if live and rng.random() < 0.01:
            generator.cancel(rng.choice(live))
        if rng.random() < 0.005 and generator.table.available:
            found[f"logits {step}"] = generator.logits([1, 2, 3]).tolist()
        for event in generator.step():
            if isinstance(event, Finished | Failed):
                live.remove(event.request_id)
                found[event.request_id] = told(event.result) if isinstance(event, Finished) else str(event.error)
    generator.table.check()
    return found


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_between(seed: int) -> None:
    wanted, halted = both_ways(lambda rt: play(rt, seed))
    assert wanted > 10 and halted > 0


def test_a_request_that_is_given_up_keeps_nothing_running() -> None:
    with exl.load("demo", context=512, speculate="off") as rt:
        stream = rt.stream(STORY, max_tokens=200, sampling=exl.SamplingParams(**ENDLESS))
        for number, _ in enumerate(stream):
            if number == 20:
                break
        taken, halted = counts(rt)
        stream.close()
        assert counts(rt) == (taken, halted + 1)
        wanted = told(rt.generate(FOX, max_tokens=50, sampling=exl.SamplingParams(temperature=0)))
    with exl.load("demo", context=512, speculate="off") as rt:
        assert told(rt.generate(FOX, max_tokens=50, sampling=exl.SamplingParams(temperature=0))) == wanted


def test_where_all_cpus_compute_only_a_slow_reader_is_run_ahead_of() -> None:
    params = exl.SamplingParams(**ENDLESS)
    native.ops().set_threads(usable_processors())
    with exl.load("demo", context=512, speculate="off") as rt:
        wanted = told(rt.generate(STORY, max_tokens=60, sampling=params))
        before = counts(rt)[0]
        events = []
        for event in rt.stream(STORY, max_tokens=60, sampling=params):
            time.sleep(0.004)
            events.append(event)
        assert counts(rt)[0] - before > 30
        assert isinstance(events[-1], exl.Finished) and told(events[-1].result)[:3] == wanted[:3]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_the_thread_goes_with_its_model() -> None:
    def threads() -> int:
        return sum("exl-ahead" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))

    before = threads()
    for _ in range(3):
        with exl.load("demo", context=512, speculate="off") as rt:
            rt.generate(STORY, max_tokens=20, sampling=exl.SamplingParams(**ENDLESS))
            assert counts(rt)[0] > 0 and threads() > 0
        del rt
    gc.collect()
    until = time.monotonic() + 10
    while threads() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() <= before


def test_many_threads_ask_at_once() -> None:
    params = exl.SamplingParams(temperature=0)
    prompts = [f"{word} {STORY}" for word in ("A", "So", "But", "Then")]
    with exl.load("demo", context=512, speculate="off") as rt:
        alone = [rt.generate(prompt, max_tokens=60, sampling=params).ids for prompt in prompts]
    with exl.load("demo", context=512, speculate="off") as rt:
        found: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            for _ in range(3):
                found[number] = rt.generate(prompts[number], max_tokens=60, sampling=params).ids

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number] for number in range(len(prompts))] == alone


# --- processes --------------------------------------------------------------------------------------------------------

LEAVE = """
import os, sys
import exl_runtime as exl
rt = exl.load("demo", context=512, speculate="off", threads=1)
stream = rt.stream("Once upon a time", max_tokens=200, sampling=exl.SamplingParams(temperature=0, ignore_eos=True))
for number, _ in enumerate(stream):
    if number == 20:
        break
assert rt._engine().model.step.program.ahead[0] > 10
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        text = "".join(event.text for event in stream if isinstance(event, exl.Text))
        os._exit(0 if len(text) > 200 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(sum(isinstance(event, exl.Text) for event in stream) > 100)
elif sys.argv[1] == "close":
    rt.close()
    print(True)
elif sys.argv[1] == "raise":
    raise SystemExit(3)
else:
    print(True)
"""


@pytest.mark.parametrize("how", ["exit", "close", "raise", "fork"])
def test_a_process_may_end_or_fork_in_the_middle(how, repo) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEAVE, how],
        capture_output=True,
        text=True,
        cwd=repo,
        timeout=120,
        check=False,
    )
    assert done.returncode == (3 if how == "raise" else 0), done.stderr
    assert done.stderr == "" and (how == "raise" or done.stdout.strip() == "True")

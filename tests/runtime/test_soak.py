"""Many exchanges, in any order and from several threads, leave nothing behind: no pages, no requests, no memory."""

import gc
import random
import threading
from dataclasses import replace

from resident import resident

import exl_runtime as exl

SAID = (
    "Hi!",
    "My name is Mira.",
    "What is the capital of France?",
    "Tell me a story about a fox, a hen and a long, cold river in the north of the country.",
)
ENDLESS = exl.SamplingParams(ignore_eos=True)


def exchange(rt: exl.Runtime, chat: exl.ChatSession, rng: random.Random) -> None:
    act = rng.random()
    if act < 0.1:
        chat.clear()
    elif act < 0.2 and chat.turns:
        chat.regenerate()
    elif act < 0.3 and chat.turns:
        chat.edit(0, "Hello there.")
    elif act < 0.35 and chat.turns:
        chat.undo()
    elif act < 0.5:
        for count, _ in enumerate(chat.stream("Tell me a story.")):
            if count == 4:
                chat.cancel()
    elif act < 0.6:
        for count, _ in enumerate(rt.stream("Once upon a time", max_tokens=40, sampling=ENDLESS)):
            if count == 5:
                break
    elif act < 0.7:
        rt.generate("Once upon a time", max_tokens=60, deadline=rng.random() * 0.05, sampling=ENDLESS)
    else:
        chat.send(rng.choice(SAID))


def talk(rt: exl.Runtime, seed: int, exchanges: int) -> None:
    rng = random.Random(seed)
    chat = rt.chat()
    chat.settings = replace(chat.settings, max_tokens=16, overflow=("drop", "window")[seed % 2])
    for _ in range(exchanges):
        exchange(rt, chat, rng)


def talk_together(rt: exl.Runtime, seed: int, exchanges: int) -> None:
    """Two conversations at once; what goes wrong in a thread goes wrong here."""
    wrong: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            talk(rt, seed, exchanges)
        except BaseException as err:  # handed on below
            wrong.append(err)

    threads = [threading.Thread(target=run, args=(seed + i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def table_of(rt: exl.Runtime):
    from exl_runtime.cache.pages import PageTable

    return next(found for found in gc.get_objects() if type(found) is PageTable and found.pages == rt.stats.pages_total)


def test_many_exchanges_leave_nothing_behind() -> None:
    with exl.load("demo", context=300) as rt:
        talk_together(rt, 0, 20)  # what is made once is made now
        before = resident()
        for round_number in range(1, 5):
            talk_together(rt, 10 * round_number, 20)
        grown = resident() - before
        stats = rt.stats
        assert stats.requests > 100
        assert (stats.pages_held, stats.running, stats.waiting) == (0, 0, 0)
        table_of(rt).check()
        assert grown < rt.info.cache_bytes + 12 * 2**20, f"grown by {grown / 2**20:.1f} MiB"


def test_opening_and_closing_gives_the_memory_back() -> None:
    def once() -> None:
        with exl.load("demo", context=512) as rt:
            rt.generate("Hi", max_tokens=2)

    for _ in range(3):
        once()
    before = resident()
    for _ in range(10):
        once()
    assert resident() - before < 8 * 2**20

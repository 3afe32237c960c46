"""Hundreds of requests of every kind, ended in every way, leave nothing behind: no page, no request, no memory."""

import random
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from adapters import shapes_of, write_adapter
from resident import resident

import exl_runtime as exl
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request
from exl_runtime.generation.stream import Failed, Finished
from exl_runtime.runtime.samples import samples_of

REQUESTS = 500
PAGE, PAGES = 16, 45  # tokens, and few enough pages that requests have to yield
CONTEXT = 240
WORDS = ("fox", "hen", "river", "north", "map", "old", "cold", "story", "friend", "apple")


class Maker:
    """Requests by chance: the same ones for the same seed."""

    def __init__(self, rt: exl.Runtime, seed: int) -> None:
        self.rt = rt
        self.rng = random.Random(seed)
        self.count = 0
        self.mixes: tuple[Any, ...] = ((), (), rt._loras.mix("tale"), rt._loras.mix({"tale": 0.5}))
        self.grammars: tuple[Any, ...] = (None,)
        if find_spec("llguidance") is not None:
            self.grammars = (exl.Grammar.regex("[a-z ]{5,30}"), exl.Grammar.choice(["yes", "no", "perhaps"]))
        self.starts = [rt.tokenizer.encode(" ".join(self.rng.choices(WORDS, k=30))) * 3 for _ in range(4)]

    def sampling(self) -> exl.SamplingParams:
        rng = self.rng
        options: dict[str, Any] = {"seed": rng.randrange(100), "temperature": rng.choice((0.0, 0.7, 1.3))}
        options |= rng.choice(({}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"mirostat": 2}))
        return exl.SamplingParams(**options)

    def next(self) -> list[Request]:
        """One request, or the samples of one."""
        rng = self.rng
        self.count += 1
        start = rng.choice(self.starts)
        prompt = [*start[: rng.choice((3, 20, 60, len(start)))], *rng.choices(range(20, 200), k=rng.randrange(1, 30))]
        options: dict[str, Any] = {"speculate": rng.choice(("auto", "ngram", "draft", "off"))}
        kind = rng.random()
        if kind < 0.15:
            options["grammar"] = rng.choice(self.grammars)
        elif kind < 0.25:
            options["banned_strings"] = ("the", "fox ")
        elif kind < 0.3:
            options |= {"negative_prompt": tuple(start[:20]), "guidance": 1.5}
        elif kind < 0.4:
            options |= {"overflow": "window", "max_tokens": 100}
            prompt = (prompt * 20)[: CONTEXT - 80]
        elif kind < 0.45:
            options["prompt_logprobs"] = 2
        elif kind < 0.5:
            options["processors"] = (failing,)
        if rng.random() < 0.15:
            options["deadline"] = rng.random() * 0.05 + 1e-6
        request = Request(
            id=f"soak-{self.count}",
            prompt=tuple(prompt[: CONTEXT - 80]),
            sampling=self.sampling(),
            priority=rng.choice((0, 0, 0, 1, -1)),
            lora=rng.choice(self.mixes),
            **{"max_tokens": rng.choice((1, 4, 8, 24)), **options},
        )
        return samples_of(request, rng.randrange(2, 5)) if rng.random() < 0.15 else [request]


def failing(ids: list[int], logits: Any) -> Any:
    """A processor of somebody's that breaks now and then."""
    if len(ids) % 5 == 0:
        raise ValueError("broken")
    return logits


def soak(generator: Generator, maker: Maker, amount: int) -> dict[str, int]:
    """Run so many requests, at most 12 at once; how they ended."""
    live: set[str] = set()
    ends: dict[str, int] = {}
    started = 0
    while started < amount or live:
        while started < amount and len(live) < 12 and maker.rng.random() < 0.7:
            for request in maker.next():
                live.add(generator.submit(request))
                started += 1
        if live and maker.rng.random() < 0.08:
            generator.cancel(maker.rng.choice(sorted(live)))
        for event in generator.step():
            if isinstance(event, Finished | Failed):
                live.remove(event.request_id)
                end = event.result.stop_reason if isinstance(event, Finished) else type(event.error).__name__
                ends[end] = ends.get(end, 0) + 1
        generator.table.check()
    return ends


def test_hundreds_of_mixed_requests_leave_nothing_behind(tmp_path) -> None:
    with exl.load("demo", context=CONTEXT, threads=1, draft="demo") as rt:
        rt.load_lora(write_adapter(tmp_path / "tale", shapes_of(rt._engine().model)))
        generator = small(rt)
        maker = Maker(rt, 1)
        soak(generator, maker, REQUESTS // 5)  # what is made once is made now
        before = resident()
        ends = soak(generator, maker, REQUESTS)
        grown = resident() - before
        assert {"eos", "length", "cancelled", "deadline", "ValueError"} <= ends.keys(), ends
        assert set(ends) <= {"eos", "length", "stop", "cancelled", "deadline", "context", "ValueError"}, ends
        assert sum(ends.values()) >= REQUESTS
        stats = generator.stats
        assert stats.preemptions > 0 and stats.reused_tokens > 0 and stats.accepted_tokens > 0
        assert (stats.pages_held, stats.running, stats.waiting, generator.busy) == (0, 0, 0, False)
        assert not generator._live and not generator._boxes and not generator._orphans and not generator._cancelled
        generator.table.check()
        generator.forget()
        assert generator.table.available == PAGES and generator.table.idle == 0
        assert grown < 8 * 2**20, f"grown by {grown / 2**20:.1f} MiB"


def small(rt: exl.Runtime) -> Generator:
    """A generator over the runtime's models with a cache that is too small for what is to come."""
    from exl_runtime.cache.storage import KVStorage

    engine = rt._engine()
    draft = engine._speculator.drafter
    geometries = [replace(kv.geometry, page_size=PAGE) for kv in (engine.kv, draft.kv)]
    pages = [KVStorage(geometry, PAGES, engine.model.device) for geometry in geometries]
    return Generator(
        engine.model, pages[0], rt.tokenizer, context=CONTEXT, prefill_tokens=64, draft=(draft.model, pages[1])
    )

"""Generation with recorded steps against generation without: the same replies, over a model that notices every wrong
page, slot, table, length or token, and with sampling on the (emulated) device."""

from dataclasses import dataclass, field

import pytest
import torch
from fakes import LAYERS, VOCAB, Clock, FakeSpec, FakeTokenizer, FakeTransformer
from recording import FakeRecorder

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32
from exl_runtime.errors import ExlError
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request, Result
from exl_runtime.sampling.params import SamplingParams


@dataclass(frozen=True)
class Spec(FakeSpec):
    layers: tuple[()] = ()  # no ropes to tell apart


class Recordable(FakeTransformer):
    def run(self, batch, kv) -> torch.Tensor:
        return self.forward(batch, kv)

    def why_not_recorded(self, kv) -> None:
        return None

    def held_by(self, batch) -> tuple[()]:
        return ()


@dataclass
class Rig:
    recorder: FakeRecorder | None
    pages: int = 24
    model: Recordable = field(default_factory=lambda: Recordable(Spec()))

    def __post_init__(self) -> None:
        geometry = CacheGeometry(LAYERS, 1, 1, FP32, 4)
        kv = KVStorage(geometry, self.pages, torch.device("cpu"))
        self.generator = Generator(self.model, kv, FakeTokenizer(), recorder=self.recorder, clock=Clock())

    @property
    def recorded_steps(self) -> int:
        decoder = self.generator._decoder
        return 0 if decoder is None else decoder.steps

    def run(self, requests: list[Request]) -> list[Result]:
        results = self.generator.run(requests)
        self.generator.table.check()
        assert self.generator.table.available == self.pages, "pages leaked"
        return results


def ask(number: int, max_tokens: int = 12, *, speculate: str = "off", **rest) -> Request:
    prompt = tuple((number * 5 + i * i) % 26 for i in range(3 + number))
    more = {name: rest.pop(name) for name in ("stop", "stop_ids", "grammar", "banned_strings") if name in rest}
    params = SamplingParams(**{"temperature": 1.0, "min_p": 0.0, "seed": number, **rest})
    return Request(prompt=prompt, max_tokens=max_tokens, sampling=params, speculate=speculate, **more)


MIXED = [
    ask(0),
    ask(1, 20, temperature=0.0),
    ask(2, 5, repetition_penalty=1.6, penalty_range=5),
    ask(3, 17, top_k=6, top_p=0.8),
    ask(4, 9, stop=("q",)),
    ask(5, 1),
]


def same(a: list[Result], b: list[Result]) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one.ids, one.text, one.stop_reason) == (other.ids, other.text, other.stop_reason)


@pytest.mark.parametrize("pages", [24, 9])  # the second: sequences yield their pages and come back
def test_replies_are_those_of_usual_steps(emulated, pages) -> None:
    rig = Rig(FakeRecorder(), pages=pages)
    same(rig.run(MIXED), Rig(None, pages=pages).run(MIXED))
    assert rig.recorded_steps > 5
    one_by_one = [rig.run([request])[0] for request in MIXED]
    same(one_by_one, Rig(None).run(MIXED))


def test_one_reply_alone_runs_ahead(emulated) -> None:
    rig = Rig(FakeRecorder())
    request = ask(2, 16, ignore_eos=True)
    same(rig.run([request]), Rig(None).run([request]))
    assert rig.recorded_steps == 15  # the first token comes from the prompt's pass
    # Launched: each step once, where it was asked for or before; one too many at the end at most.
    assert rig.recorder.repeated <= 16


def test_guesses_and_constraints_run_as_usual_and_the_device_catches_up(emulated) -> None:
    requests = [
        ask(1, 14, speculate="ngram", repetition_penalty=1.2),
        ask(2, 14, banned_strings=("zz",)),
        ask(3, 14, logprobs=2),
        ask(4, 14, typical_p=0.9),
        ask(0, 30, presence_penalty=0.4),
    ]
    rig = Rig(FakeRecorder())
    same(rig.run(requests), Rig(None).run(requests))
    assert rig.recorded_steps > 5  # of the last one, once it is alone


def test_more_sequences_than_a_recorded_step_takes(emulated) -> None:
    requests = [ask(i % 6, 4 + i, presence_penalty=0.3 * (i % 3)) for i in range(11)]
    rig = Rig(FakeRecorder(), pages=80)
    same(rig.run(requests), Rig(None, pages=80).run(requests))
    assert rig.recorded_steps > 5


def test_a_recording_that_fails_is_a_warning_and_nothing_else(emulated, caplog) -> None:
    recorder = FakeRecorder()
    recorder.fails = True
    rig = Rig(recorder)
    same(rig.run(MIXED), Rig(None).run(MIXED))
    assert rig.recorded_steps == 0
    assert [record.message for record in caplog.records if "recorded step failed" in record.message] == [
        "a recorded step failed, running as usual: operation not permitted when stream is capturing"
    ]


def test_a_device_without_recording_is_asked_and_left_alone(emulated) -> None:
    rig = Rig(FakeRecorder(why="no graphs here"))
    same(rig.run(MIXED), Rig(None).run(MIXED))
    assert rig.recorded_steps == 0 == rig.recorder.recorded


def test_an_impossible_row_is_explained_to_its_owner(emulated) -> None:
    impossible = ask(1, 8, banned_tokens=tuple(range(VOCAB - 1)), min_tokens=4)
    with pytest.raises(ExlError, match="no token may be chosen"):
        Rig(FakeRecorder()).run([impossible, ask(2, 8)])

"""Recorded decode steps: the same tokens as eager passes, buckets, page tables that grow, steps launched ahead."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import moved, open_model
from quantize import quantize_folder
from recording import FakeRecorder
from tiny import by_name, write

from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP16
from exl_runtime.model.batch import ForwardBatch
from exl_runtime.model.fused import FusedTransformer
from exl_runtime.model.graph import DecodeGraphs, Row
from exl_runtime.model.graph_cuda import CudaRecorder
from exl_runtime.model.placement import geometry_of
from exl_runtime.sampling.device import DeviceSampling
from exl_runtime.sampling.params import SamplingParams

SIZE = 16  # tokens of a page


class CountingRecorder(CudaRecorder):
    """CUDA graphs, counted as `FakeRecorder` counts."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.why: str | None = None
        self.recorded = self.repeated = self.uploads = 0
        self.fails = False

    def why_not(self) -> str | None:
        return self.why

    def record(self, warm_up, body):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        replay = super().record(warm_up, body)
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            replay()

        return repeat

    def upload(self, values, target) -> None:
        self.uploads += 1
        super().upload(values, target)


@pytest.fixture(scope="module", params=["emulated", pytest.param("hardware", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FusedTransformer:
    """Emulated with recordings that run the work itself; on a card with CUDA graphs."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
    root: Path = tmp_path_factory.mktemp("graph")
    folder = root / "exl2"
    quantize_folder(write(by_name("llama"), root), folder, "exl2")
    opened = open_model(folder, "cuda", torch.float16, device="cuda" if request.param == "hardware" else "cpu")
    assert isinstance(opened, FusedTransformer)
    return opened


class Play:
    """Sequences decoded by graphs and, beside them, by eager passes with a cache and sampling state of their own."""

    def __init__(
        self, model: FusedTransformer, params: list[SamplingParams], *, pages: int = 12, prompt_length: int = 5
    ) -> None:
        self.model = model
        self.recorder = FakeRecorder() if model.device.type == "cpu" else CountingRecorder(model.device)
        geometry = replace(geometry_of(model.spec, FP16), page_size=SIZE)
        self.caches = [KVStorage(geometry, pages, model.device) for _ in range(2)]
        vocab = model.spec.vocab_size
        self.choosers = [
            DeviceSampling(slots=len(params), vocab_size=vocab, capacity=64, device=model.device) for _ in range(2)
        ]
        self.graphs = DecodeGraphs(model, self.caches[0], self.choosers[0], self.recorder)
        self.free = [*range(pages)]
        self.tokens: list[list[int]] = []
        self.prompts: list[int] = []
        self.pages: list[list[int]] = []
        self.slots: list[list[int]] = []
        for number, one in enumerate(params):
            prompt = [(number * 7 + 3 * i) % 100 + 5 for i in range(prompt_length + number)]
            pages_of = [self.free.pop() for _ in range(-(-len(prompt) // SIZE))]
            for kv in self.caches:
                model.forward(moved(eager_batch([(prompt[:-1], 0, pages_of)]), model.device), kv)
            self.slots.append(
                [
                    chooser.admit(one, seed=number, eos_ids=set(), prompt=prompt, generated=[])
                    for chooser in self.choosers
                ]
            )
            self.tokens.append(prompt)
            self.prompts.append(len(prompt))
            self.pages.append(pages_of)

    def rows(self, which: Sequence[int], *, spare: bool = True) -> list[Row]:
        for i in which:
            length = len(self.tokens[i]) - 1
            while length // SIZE >= len(self.pages[i]):
                self.pages[i].append(self.free.pop())
        return [
            Row(
                owner=i,
                token=self.tokens[i][-1],
                length=len(self.tokens[i]) - 1,
                pages=[*self.pages[i]],
                rope_length=0,
                slot=self.slots[i][0],
            )
            for i in which
        ]

    def eager(self, which: Sequence[int]) -> list[int]:
        parts = [([self.tokens[i][-1]], len(self.tokens[i]) - 1, self.pages[i]) for i in which]
        device = self.model.device
        logits = self.model.forward(moved(eager_batch(parts), device), self.caches[1])
        out = torch.empty(len(which), dtype=torch.int64, device=device)
        slots = [self.slots[i][1] for i in which]
        index = torch.tensor(slots, dtype=torch.int32, device=device)
        self.choosers[1].sample(logits, index, out, kind=self.choosers[1].kind(slots))
        return out.tolist()

    def step(self, which: Sequence[int]) -> list[int]:
        """One step both ways; the tokens, which have to be the same."""
        rows = self.rows(which)
        assert self.graphs.refuses(rows) is None
        if not self.graphs.continues(rows):
            for slot in self.graphs.drop():
                i = next(i for i, pair in enumerate(self.slots) if pair[0] == slot)
                self.choosers[0].restore(
                    slot, prompt=self.tokens[i][: self.prompts[i]], generated=self.tokens[i][self.prompts[i] :]
                )
        drawn = self.graphs.step(rows)
        assert drawn == self.eager(which)
        for i, token in zip(which, drawn, strict=True):
            self.tokens[i].append(token)
        return drawn


def eager_batch(parts: list[tuple[list[int], int, list[int]]]) -> ForwardBatch:
    """Like driving.batch_of, for pages of SIZE tokens; logits of every last token."""
    tokens, positions, slots, starts, lengths = [], [], [], [0], []
    for new, past, pages in parts:
        where = range(past, past + len(new))
        tokens += new
        positions += where
        slots += [pages[i // SIZE] * SIZE + i % SIZE for i in where]
        starts.append(len(tokens))
        lengths.append(past + len(new))
    width = max(len(pages) for _, _, pages in parts)
    return ForwardBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        q_starts=torch.tensor(starts, dtype=torch.int32),
        kv_lengths=torch.tensor(lengths, dtype=torch.int32),
        pages=torch.tensor([[*pages, *[0] * (width - len(pages))] for _, _, pages in parts], dtype=torch.int32),
        rope_lengths=(0,) * len(parts),
        logit_rows=torch.tensor(starts[1:]) - 1,
    )


GREEDY, WARM = SamplingParams(temperature=0), SamplingParams(temperature=1.0, min_p=0.02)
PENALISED = SamplingParams(temperature=0.9, repetition_penalty=1.3, penalty_range=6, top_k=20)


def test_recorded_steps_draw_the_tokens_of_eager_passes_over_page_borders(model) -> None:
    play = Play(model, [WARM])
    for _ in range(30):  # from 4 keys to 34: three pages, tables of 1, 2 and 4
        play.step([0])
    assert play.graphs.buckets == play.recorder.recorded == 3
    # Every step but the first of a page was launched before it was asked for.
    assert play.recorder.repeated == 30 + 1
    assert torch.equal(play.caches[0].layer(1)[0][play.pages[0][:2]], play.caches[1].layer(1)[0][play.pages[0][:2]])


def test_an_unchanged_batch_uploads_nothing(model) -> None:
    play = Play(model, [WARM, GREEDY])
    play.step([0, 1])
    before = play.recorder.uploads
    for _ in range(5):
        play.step([0, 1])
    assert play.recorder.uploads == before


def test_batches_that_change_drop_the_step_ahead(model) -> None:
    play = Play(model, [WARM, PENALISED, GREEDY])
    for which in ([0, 1, 2], [0, 1, 2], [1], [1], [0, 2], [2, 0], [0, 1, 2], [0, 1, 2]):
        play.step(which)
    assert play.graphs.buckets == 3  # by the number of rows; the order does not matter
    play = Play(model, [PENALISED])
    play.step([0])
    play.tokens[0][-1] = 11  # as when a token is taken back and another put in its place
    rows = play.rows([0])
    assert not play.graphs.continues(rows)
    with pytest.raises(RuntimeError, match="drop it first"):
        play.graphs.step(rows)


def test_a_page_that_is_there_early_is_used_by_the_step_ahead(model) -> None:
    play = Play(model, [WARM], prompt_length=46)  # three pages in a table of four
    play.step([0])
    play.pages[0].append(play.free.pop())
    for _ in range(6):
        play.step([0])
    assert play.graphs.buckets == 1
    assert play.recorder.repeated == 7 + 1  # no step was launched twice, not even over the border


def test_another_page_in_the_same_place_is_not_the_same_step(model) -> None:
    play = Play(model, [GREEDY])
    play.step([0])
    rows = play.rows([0])
    assert play.graphs.continues(rows)
    assert not play.graphs.continues([replace(rows[0], pages=[rows[0].pages[0] + 1])])
    assert not play.graphs.continues([replace(rows[0], owner="somebody else")])
    assert not play.graphs.continues([])


def test_what_cannot_be_recorded_has_a_reason(model) -> None:
    play = Play(model, [GREEDY])
    rows = play.rows([0])
    assert "up to 8" in (play.graphs.refuses(rows * 9) or "")
    assert "0 sequences" in (play.graphs.refuses([]) or "")
    play.recorder.why = "no graphs here"
    assert play.graphs.refuses(rows) == "no graphs here"
    play.recorder.why, play.recorder.fails = None, True
    with pytest.raises(RuntimeError, match="capturing"):
        play.graphs.step(rows)
    assert "recording a step failed: operation not permitted" in (play.graphs.refuses(rows) or "")


def test_a_row_without_a_token_says_so(model) -> None:
    nothing = SamplingParams(banned_tokens=tuple(range(model.spec.vocab_size)))
    play = Play(model, [nothing, GREEDY])
    assert play.step([0, 1])[0] == -1

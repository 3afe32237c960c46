"""A transformer, tokenizer and sampler without weights, in which every mistake of cache or scheduler shows.

The fake keeps token ids (as keys) and rope position + length (as values) in the real pages, and derives its logits
from a hash of everything it reads back through the page table. A wrong page, slot, table or length gives other text.
`expected` computes the same without pages: the oracle.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP32
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request
from exl_runtime.model.batch import ForwardBatch
from exl_runtime.sampling.params import SamplingParams

VOCAB = 32
EOS = VOCAB - 1
LAYERS = 2


@dataclass(frozen=True)
class FakeSpec:
    vocab_size: int = VOCAB
    context_length: int = 10_000
    eos_ids: tuple[int, ...] = (EOS,)
    layers: tuple[object, ...] = ()  # nothing in the fake turns keys
    rope_switch: int = 0  # above 0: longer plans get another rope
    windows: tuple[int | None, ...] = ()  # of every layer

    def rope_length(self, planned: int) -> int:
        return planned if self.rope_switch and planned > self.rope_switch else 0


def logits_of(tokens: Sequence[int], rope_length: int = 0, windows: Sequence[int | None] = ()) -> Tensor:
    """float32 (vocab): what the fake says after `tokens` at positions 0, 1, ..."""
    keys = torch.tensor(tokens, dtype=torch.float32)
    values = torch.arange(1, len(tokens) + 1) + 1000.0 * rope_length
    return _from_state(torch.cat([part[-(w or 0) :] for w in windows or (None,) * LAYERS for part in (keys, values)]))


def _from_state(seen: Tensor) -> Tensor:
    """float32, what all layers see -> logits that no other content gives."""
    digest = hashlib.blake2b(seen.numpy().tobytes(), digest_size=VOCAB).digest()
    logits = torch.frombuffer(bytearray(digest), dtype=torch.uint8).float() / 32
    logits[EOS] = -4.0  # rare, so that replies have some length
    return logits


class FakeTransformer:
    def __init__(self, spec: FakeSpec | None = None) -> None:
        self.spec = spec or FakeSpec()
        self.device = torch.device("cpu")
        self.passes: list[list[int]] = []  # new tokens per sequence, per pass
        self.before: Callable[[ForwardBatch], None] = lambda batch: None

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> Tensor:
        check_batch(batch, kv)
        self.before(batch)
        starts = batch.q_starts.tolist()
        self.passes.append([stop - start for start, stop in pairwise(starts)])
        groups, total, sequences = kv.geometry.groups, len(batch.tokens), len(batch.kv_lengths)
        for group, slots in zip(groups, batch.slots.split(total), strict=True):
            for layer in group.layers:
                keys, values = (pages.view(-1) for pages in kv.layer(layer))
                keys[slots] = batch.tokens.float()
                ropes = torch.tensor(batch.rope_lengths).repeat_interleave(batch.q_starts.diff().long())
                values[slots] = (batch.positions + 1 + 1000 * ropes).float()
        of_layer = {layer: number for number, group in enumerate(groups) for layer in group.layers}
        rows = []
        for row in batch.logit_rows.tolist():
            index = max(s for s, start in enumerate(starts[:-1]) if start <= row)
            length = int(batch.kv_lengths[index]) - (starts[index + 1] - 1 - row)
            parts = []
            for layer in range(LAYERS):
                table = batch.pages[of_layer[layer] * sequences + index].long()
                window = (self.spec.windows or (None,) * LAYERS)[layer]
                at = torch.arange(0 if window is None else max(0, length - window), length)
                where = table[at // kv.page_size] * kv.page_size + at % kv.page_size
                parts += [pages.view(-1)[where] for pages in kv.layer(layer)]
            rows.append(_from_state(torch.cat(parts)))
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)


def check_batch(batch: ForwardBatch, kv: KVStorage) -> None:
    """The contract of ForwardBatch, as far as a machine can check it."""
    total, sequences = len(batch.tokens), len(batch.kv_lengths)
    assert total > 0
    assert batch.tokens.dtype == batch.positions.dtype == batch.slots.dtype == batch.logit_rows.dtype == torch.int64
    assert batch.q_starts.dtype == batch.kv_lengths.dtype == batch.pages.dtype == torch.int32
    groups = len(kv.counts)
    assert batch.q_starts.shape == (sequences + 1,) and sequences == len(batch.rope_lengths)
    assert batch.pages.shape[0] == groups * sequences
    assert batch.q_starts[0] == 0 and batch.q_starts[-1] == total and (batch.q_starts.diff() > 0).all()
    assert batch.positions.shape == (total,) and batch.slots.shape == (groups * total,)
    for slots, pages in zip(batch.slots.split(total), kv.counts, strict=True):
        assert len(set(slots.tolist())) == total, "two tokens in one slot"
        assert int(slots.min()) >= 0 and int(slots.max()) < pages * kv.page_size


@dataclass(frozen=True)
class FakeDraw:
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Recorder:
    """Draws the likeliest token and keeps the logits."""

    rows: list[Tensor] = field(default_factory=list)

    def sample(self, logits: Tensor, prompt: object, generated: object) -> FakeDraw:
        self.rows.append(logits.clone())
        return FakeDraw(int(logits[5:].argmax()) + 5)

    guess = sample


@dataclass
class FakeSampler:
    """Draws by inverse distribution with a number that depends on seed and index only."""

    seed: int
    logprobs: int = 0

    def sample(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> FakeDraw:
        digest = hashlib.blake2b(b"%d %d" % (self.seed, len(generated)), digest_size=4).digest()
        number = int.from_bytes(digest, "little") / 2**32
        probabilities = torch.softmax(logits.double(), dim=-1)
        token = min(int((probabilities.cumsum(0) < number).sum()), VOCAB - 1)
        if not self.logprobs:
            return FakeDraw(token)
        best = probabilities.log().topk(self.logprobs)
        pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return FakeDraw(token, float(probabilities[token].log()), pairs)

    def guess(self, logits: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> int:
        return self.sample(logits, prompt, generated).id

    def judge(self, token: int, logits: Tensor) -> FakeDraw:
        return FakeDraw(token)

    def state(self) -> tuple[()]:
        return ()

    def restore(self, state: tuple[()]) -> None:
        assert state == ()


def letter(token: int) -> str:
    return chr(ord("a") + token) if token < 26 else "." if token != EOS else "<eos>"


@dataclass
class FakeDetokenizer:
    held: str = ""

    def push(self, token: int) -> str:
        """'z' comes out with the next token, as half a character would."""
        text, self.held = self.held + letter(token), ""
        if text.endswith("z"):
            text, self.held = text[:-1], "z"
        return text

    def finish(self) -> str:
        return self.held


class FakeTokenizer:
    eos_id = EOS
    special_ids = frozenset({EOS})

    def id_of(self, token: str) -> int | None:
        return None

    def detokenizer(self, skip_special: bool = True) -> FakeDetokenizer:
        return FakeDetokenizer()


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Rig:
    """A generator over fakes, with small pages."""

    pages: int | tuple[int, ...] = 16  # of every pool
    page_size: int = 4
    context: int | None = None
    prefill_tokens: int = 8
    max_running: int = 64
    spec: FakeSpec = field(default_factory=FakeSpec)
    draft: FakeTransformer | None = None
    host_bytes: int = 0

    def __post_init__(self) -> None:
        geometry = CacheGeometry(LAYERS, 1, 1, FP32, self.page_size, self.spec.windows)
        self.kv = KVStorage(geometry, self.pages, torch.device("cpu"))
        self.model = FakeTransformer(self.spec)
        self.clock = Clock()
        draft = self.draft and (self.draft, KVStorage(geometry, self.pages, torch.device("cpu")))
        self.generator = Generator(
            self.model,
            self.kv,
            FakeTokenizer(),
            context=self.context,
            prefill_tokens=self.prefill_tokens,
            max_running=self.max_running,
            make_sampler=lambda request, seed: FakeSampler(seed, request.sampling.logprobs),
            draft=draft,
            host_bytes=self.host_bytes,
            clock=self.clock,
        )
        self.table = self.generator.table

    def check(self) -> None:
        """Invariants of the table; and nothing is held once nothing runs."""
        self.generator.pools.check()
        if not self.generator.busy:
            for pool, pages in zip(self.generator.pools, self.kv.counts, strict=True):
                assert pool.table.available == pages, "pages leaked"


def request(
    prompt: Sequence[int], max_tokens: int | None = 8, seed: int = 0, logprobs: int = 0, **rest: object
) -> Request:
    sampling = SamplingParams(seed=seed, logprobs=logprobs)
    return Request(prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling, **rest)


def expected(
    prompt: Sequence[int], count: int, seed: int = 0, rope_length: int = 0, windows: Sequence[int | None] = ()
) -> list[int]:
    """The ids that `count` steps generate, up to and including an end-of-sequence id."""
    sampler, generated = FakeSampler(seed), []
    while len(generated) < count and EOS not in generated:
        logits = logits_of([*prompt, *generated], rope_length, windows)
        generated.append(sampler.sample(logits, prompt, generated).id)
    return generated


def text_of(ids: Sequence[int]) -> str:
    return "".join(letter(token) for token in ids if token != EOS)

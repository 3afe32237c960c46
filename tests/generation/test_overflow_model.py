"""A rolled window of a real Transformer against a float64 model that lists what every token sees, and from where.

Nothing is turned there: a query looks at recent keys from its own position, and at the sinks from as many positions
earlier as have left between them.
"""

from dataclasses import dataclass, field

import pytest
import torch
from driving import open_model
from fakes import FakeDraw, FakeTokenizer
from oracles import assert_as_good_as
from tiny import by_name, model_of, write
from torch import Tensor

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import cache_type
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request

SIZE, CONTEXT = 16, 64
PAGES, SINKS = CONTEXT // SIZE, 1
PROMPT = [(7 * i * i + 3 * i + 11) % 120 + 5 for i in range(40)]


@dataclass
class Recorder:
    """Draws the likeliest token and keeps the logits."""

    rows: list[Tensor] = field(default_factory=list)

    def sample(self, logits: Tensor, prompt: object, generated: object) -> FakeDraw:
        self.rows.append(logits.clone())
        return FakeDraw(int(logits[5:].argmax()) + 5)

    guess = sample


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("rolling")


def generator_of(model, recorder: Recorder, cache: str = "fp32", pages: int = PAGES + 1) -> Generator:
    geometry = CacheGeometry(len(model.spec.layers), model.spec.kv_heads, model.spec.head_dim, cache_type(cache), SIZE)
    kv = KVStorage(geometry, pages, torch.device("cpu"))
    return Generator(model, kv, FakeTokenizer(), context=CONTEXT, make_sampler=lambda request, seed: recorder)


def ask(generator: Generator, prompt: list[int], count: int):
    request = Request(prompt=tuple(prompt), max_tokens=count, overflow="window", keep=3, speculate="off")
    (result,) = generator.run([request])
    return result


def exact(reference, ids: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits (tokens, vocab) of a Llama, every token seeing sinks and recent tokens only."""
    config, inner = reference.config, reference.to(dtype).model
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, inner.layers[0].self_attn.head_dim
    place = torch.arange(len(ids))
    shift = (place // SIZE - PAGES + 1).clamp(min=0) * SIZE  # of every query
    kept = SINKS * SIZE
    sink = place[None, :] < kept
    distance = torch.where(sink, place[:, None] - shift[:, None] - place[None, :], place[:, None] - place[None, :])
    seen = (place[None, :] <= place[:, None]) & (sink | (place[None, :] >= kept + shift[:, None]))
    if (window := getattr(config, "sliding_window", None)) is not None:
        seen &= distance < window
    rotary = inner.rotary_emb

    def turned(x: Tensor, positions: Tensor) -> Tensor:  # x (heads, tokens, dim)
        angles = positions.to(dtype)[:, None] * rotary.inv_freq.to(dtype)
        cos, sin = (angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    with torch.inference_mode():
        x = inner.embed_tokens(torch.tensor(ids))
        for layer in inner.layers:
            h, own = layer.input_layernorm(x), layer.self_attn
            q = own.q_proj(h).view(-1, heads, dim).transpose(0, 1)
            k, v = (p(h).view(-1, kv_heads, dim).transpose(0, 1) for p in (own.k_proj, own.v_proj))
            k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
            keys = turned(k, place).transpose(1, 2)
            near, far = turned(q, place) @ keys, turned(q, place - shift) @ keys
            scores = torch.where(sink, far, near) * own.scaling
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            x = x + own.o_proj((weights @ v).transpose(0, 1).reshape(len(ids), heads * dim))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return reference.lm_head(inner.norm(x)).to(dtype)


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "llama3_rope", "mistral"])
def test_logits_after_rolling_are_those_of_what_is_seen(name, backend, root) -> None:
    recorder = Recorder()
    generator = generator_of(open_model(write(by_name(name), root), backend), recorder)
    result = ask(generator, PROMPT, 140)
    assert result.dropped_tokens == ((len(PROMPT) + 138) // SIZE - PAGES + 1) * SIZE
    ids = [*PROMPT, *result.ids[:-1]]
    ours = torch.stack(recorder.rows)
    naive = exact(model_of(by_name(name)), ids, torch.float32)[len(PROMPT) - 1 :]
    oracle = exact(model_of(by_name(name)), ids)[len(PROMPT) - 1 :]
    assert_as_good_as(ours, naive, oracle, factor=6.0, floor=2e-5)


@pytest.mark.parametrize("cache", ["fp16", "q8", "k6v4"])
def test_the_next_turn_continues_the_very_same_state(cache, backend, root) -> None:
    """One reply in one go, and the same in turns that find the pages of the last one: the same logits to the bit."""
    model = open_model(write(by_name("llama"), root), backend)
    whole = Recorder()
    ids = ask(generator_of(model, whole, cache), PROMPT, 160).ids
    turns = Recorder()
    generator, said = generator_of(model, turns, cache, pages=2 * PAGES), list(PROMPT)
    while len(said) < len(PROMPT) + 160:
        result = ask(generator, said, 20)
        known = result.prompt_tokens - result.reused_tokens
        assert known == (len(PROMPT) if said == PROMPT else 1)  # the last token of the turn before
        said += result.ids
    assert said == [*PROMPT, *ids]
    one, other = torch.stack(whole.rows), torch.stack(turns.rows)
    bound = 0.0 if backend == "cpu" else 1e-4 * one.abs().max().item()
    assert (one - other).abs().max().item() <= bound

"""Every family against transformers on the same tiny checkpoint, and every way to cut a sequence against the whole."""

import pytest
import torch
from driving import batch_of, new_cache, open_model, run
from oracles import assert_as_good_as
from tiny import FAMILIES, by_name, logits_of, model_of, write

from exl_runtime.cache.types import BF16, FP16

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(90)]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_equal_transformers(family, backend, root) -> None:
    model = open_model(write(family, root), backend)
    reference = model_of(family)
    naive = logits_of(reference, IDS)
    oracle = exact_logits(reference, IDS)
    ours = run(model, IDS, [])
    assert_as_good_as(ours, naive, oracle, factor=4.0, floor=3e-6)
    assert (ours - naive).abs().max() <= 1e-4 * naive.abs().max()


def exact_logits(reference, ids):
    """The same model in float64: except for tables that transformers keeps in float32, an oracle for both."""
    return logits_of_double(reference, ids)


def logits_of_double(reference, ids):
    with torch.inference_mode():
        return reference.double()(torch.tensor([ids]), use_cache=False).logits[0].double()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_chunks_and_single_tokens_equal_the_whole(family, backend, root) -> None:
    model = open_model(write(family, root), backend)
    whole = run(model, IDS, [])
    chunked = run(model, IDS, [1, 17, 64])
    single = run(model, IDS[:40], list(range(1, 40))) if not model.spec.rope_length(90) else None
    bound = 0.0 if backend == "cpu" else 1e-4 * whole.abs().max().item()
    assert (whole - chunked).abs().max().item() <= bound
    if single is not None:
        assert (whole[:40] - single).abs().max().item() <= bound


def test_a_batch_equals_its_members_and_shared_pages_equal_own_ones(backend, root) -> None:
    model = open_model(write(by_name("mistral"), root), backend)
    long = [(5 * i * i + i) % 120 + 4 for i in range(300)]
    alone = run(model, long, [])
    kv = new_cache(model)
    first = model.forward(batch_of([(long[:256], 0, [3])]), kv)
    # Page 3 is full now: two sequences go on from it, each in a page of its own, beside an unrelated one.
    other = [*long[256:280], 5, 6, 7]
    batch = batch_of([(long[256:], 256, [3, 1]), (IDS, 0, [5]), (other, 256, [3, 2])])
    together = model.forward(batch, kv)
    bound = 0.0 if backend == "cpu" else 1e-4 * alone.abs().max().item()
    assert (torch.cat([first, together[:44]]) - alone).abs().max().item() <= bound
    assert (together[44 : 44 + len(IDS)] - run(model, IDS, [])).abs().max().item() <= bound
    assert (together[-27:] - run(model, long[:256] + other, [])[256:]).abs().max().item() <= bound


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_cached_prefix_equals_computing_it(family, backend, root) -> None:
    """One full page shared, a part of the next one copied: what the page table does on a hit."""
    model = open_model(write(family, root), backend)
    long = [(5 * i * i + i) % 120 + 4 for i in range(300)]
    rope_length = model.spec.rope_length(300)
    kv = new_cache(model)
    whole = model.forward(batch_of([(long, 0, [3, 1])], rope_length=rope_length), kv)
    kv.copy_page(1, 4, 20)
    rest = model.forward(batch_of([(long[276:], 276, [3, 4])], rope_length=rope_length), kv)
    bound = 0.0 if backend == "cpu" else 1e-4 * whole.abs().max().item()
    assert (rest - whole[276:]).abs().max().item() <= bound


def test_only_the_wanted_rows_come_back(root) -> None:
    model = open_model(write(by_name("qwen3"), root), "reference")
    whole = run(model, IDS, [])
    last = model.forward(batch_of([(IDS, 0, [0])], all_logits=False), new_cache(model))
    assert last.shape == (1, model.spec.vocab_size)
    torch.testing.assert_close(last[0], whole[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_sequences_of_different_length_plans_share_a_pass(name, backend, root) -> None:
    model = open_model(write(by_name(name), root), backend)
    short, long = IDS[:30], IDS
    assert model.spec.rope_length(30) != model.spec.rope_length(90)
    kv = new_cache(model)
    batch = batch_of([(short, 0, [0]), (long, 0, [1])])
    mixed = model.forward(
        type(batch)(
            **{
                **{f: getattr(batch, f) for f in batch.__slots__},
                "rope_lengths": tuple(map(model.spec.rope_length, (30, 90))),
            }
        ),
        kv,
    )
    torch.testing.assert_close(mixed[:30], run(model, short, []), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[30:], run(model, long, []), rtol=1e-4, atol=1e-4)
    reference = model_of(by_name(name))
    torch.testing.assert_close(mixed[30:], logits_of(reference, long), rtol=1e-3, atol=2e-4)


def test_half_precision_cache_is_close(backend, root) -> None:
    model = open_model(write(by_name("llama"), root), backend)
    whole = run(model, IDS, [])
    for kind, bound in ((FP16, 2e-3), (BF16, 2e-2)):
        halves = model.forward(batch_of([(IDS, 0, [2])]), new_cache(model, type=kind))
        error = (halves - whole).abs().max() / whole.abs().max()
        assert 0 < error < bound


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "phi3"])
def test_half_precision_matrices_on_a_float32_stream(name, root) -> None:
    """How models run on a GPU, on the reference path: close to float32, and everything in the right dtype."""
    exact = run(open_model(write(by_name(name), root), "reference"), IDS, [])
    model = open_model(write(by_name(name), root), "reference", torch.float16)
    logits = model.forward(batch_of([(IDS, 0, [2])]), new_cache(model, type=FP16))
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() / exact.abs().max() < 1e-2

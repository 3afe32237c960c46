"""Whole models on CUDA, by emulation and under `-m gpu` on a card: out of memory, determinism, every way to decode.

On a card the same tests run many more times and at sizes that only a card can take.
"""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_matrices import MATRICES, halves
from driving import batch_of, moved, new_cache, open_model, run
from oracles import assert_as_good_as, same_bits
from quantize import quantize_folder
from tiny import by_name, write

import exl_runtime as exl
from exl_runtime.cache.types import FP16, cache_type
from exl_runtime.errors import OutOfMemory
from exl_runtime.model import fused
from exl_runtime.model.fused import FusedTransformer
from exl_runtime.ops.linear.select import select

IDS = [(5 * i * i + 3 * i + 7) % 128 + 3 for i in range(40)]
REPEATS = 100
KINDS = {  # every format and width of matrices in whole models
    "dense": {},
    "exl2": {},
    **{f"gptq-{bits}": {"bits": bits, "group_size": 32, "act_order": bits % 2 == 0} for bits in (2, 3, 4, 8)},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def folder_of(root: Path, kind: str) -> Path:
    source = write(by_name("llama"), root)
    if kind == "dense":
        return source
    folder = root / f"llama-{kind}"
    if not folder.exists():
        more = {"symmetric": True, "version": 1, **KINDS[kind]} if KINDS[kind] else {}
        quantize_folder(source, folder, kind.split("-")[0], **more)
    return folder


def opened(root: Path, kind: str, card) -> FusedTransformer:
    model = open_model(folder_of(root, kind), "cuda", torch.float16, device=card.device)
    assert isinstance(model, FusedTransformer)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_width(card, root, kind) -> None:
    if card.emulated and kind not in ("gptq-2", "gptq-8"):
        pytest.skip("test_model.py has it")
    folder = folder_of(root, kind)
    ours = run(opened(root, kind, card), IDS, []).cpu()
    naive = run(open_model(folder, "reference", torch.float16), IDS, [])
    assert_as_good_as(ours, naive, run(open_model(folder, "reference"), IDS, []).double(), factor=3.0)


@pytest.mark.parametrize("cache", ["fp16", "bf16", "q8", "k6v4", "q4", "k2v2"])
def test_every_cache(card, root, cache) -> None:
    """Decoding token by token is close to one pass over all, and the same bits in any batch.

    Not close with codes: where a key lies near the border of two of them, the last bit of a sum decides.
    """
    if card.emulated and cache not in ("fp16", "k6v4"):
        pytest.skip("the kernels' own tests have it")
    ids = IDS[:14] if card.emulated else IDS
    model = opened(root, "exl2", card)
    kv = new_cache(model, type=cache_type(cache))
    whole = model.forward(moved(batch_of([(ids, 0, [1])]), card.device), kv)
    parts = [model.forward(moved(batch_of([([ids[i]], i, [2])]), card.device), kv) for i in range(len(ids))]
    assert torch.isfinite(whole).all() and all(torch.isfinite(part).all() for part in parts)
    if cache in ("fp16", "bf16"):
        assert (torch.cat(parts) - whole).abs().max() <= 0.02 * whole.abs().max()
    model.forward(moved(batch_of([(IDS[:9], 0, [3])]), card.device), kv)
    last = len(ids) - 1
    both = model.forward(moved(batch_of([([IDS[9]], 9, [3]), ([ids[last]], last, [2])]), card.device), kv)
    assert same_bits(both[1:], parts[-1])


def test_a_pass_gives_the_same_bits_every_time(card, root) -> None:
    model = opened(root, "exl2", card)
    kv = new_cache(model, type=FP16)
    prompt, step = (moved(batch_of(parts), card.device) for parts in ([(IDS, 0, [1])], [([7], 40, [1])]))
    first = [model.forward(batch, kv).clone() for batch in (prompt, step)]
    for _ in range(2 if card.emulated else REPEATS):
        for batch, wanted in zip((prompt, step), first, strict=True):
            assert same_bits(model.forward(batch, kv), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32, 64, 256])
@pytest.mark.parametrize("name", MATRICES)
def test_a_product_gives_the_same_bits_every_time(card, name, rows) -> None:
    if card.emulated:
        pytest.skip("every_order does more")
    kernel = select(MATRICES[name](), card.device, "cuda")
    (x,) = card.on(halves(rows, kernel.shape.in_features))
    wanted = kernel(x)
    assert all(torch.equal(kernel(x), wanted) for _ in range(REPEATS))


def test_out_of_memory_is_an_error_that_leaves_the_model_usable(card, root, monkeypatch) -> None:
    model = opened(root, "exl2", card)
    kv = new_cache(model, type=FP16)
    batch = moved(batch_of([(IDS, 0, [1])]), card.device)
    before = model.forward(batch, kv)

    def full(*args: object, **more: object) -> None:
        if not card.emulated:
            torch.empty(1 << 50, dtype=torch.uint8, device=card.device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")

    with monkeypatch.context() as patch:
        patch.setattr(fused.cuda_small, "embed", full)
        with pytest.raises(OutOfMemory, match="for a pass over 40 tokens"):
            model.forward(batch, kv)
        patch.setattr("exl_runtime.model.loader._Loader.embedding", full)
        with pytest.raises(OutOfMemory, match="for the weights"):
            opened(root, "exl2", card)
    assert same_bits(model.forward(batch, kv), before)


# --- on a card only ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_runtime_decodes_by_graphs_what_the_reference_decodes() -> None:
    with exl.load("demo", device="cuda", backend="reference", dtype="fp32", cache="fp32") as reference:
        wanted = reference.generate("Once upon a time", max_tokens=40, sampling=exl.SamplingParams(temperature=0)).ids
    with exl.load("demo", device="cuda") as runtime:
        assert runtime.info.backend == "cuda"
        got = runtime.generate("Once upon a time", max_tokens=40, sampling=exl.SamplingParams(temperature=0)).ids
        decoder = runtime._generator._decoder
        assert decoder is not None and decoder.steps > 20
        again = [runtime.generate("Once upon a time", max_tokens=40, sampling=exl.SamplingParams(seed=3)).ids]
        again += [runtime.generate("Once upon a time", max_tokens=40, sampling=exl.SamplingParams(seed=3)).ids]
    assert got[:8] == wanted[:8] and again[0] == again[1]


@pytest.mark.gpu
def test_a_real_card_that_is_full_says_so_and_recovers() -> None:
    with pytest.raises(OutOfMemory):
        exl.load("demo", device="cuda", context=1 << 30)
    with exl.load("demo", device="cuda") as runtime:
        assert runtime.generate("Once", max_tokens=3).ids


@pytest.mark.gpu
def test_closing_gives_the_memory_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    exl.load("demo", device="cuda").close()  # what libraries keep for good
    before = torch.cuda.memory_reserved()
    runtime = exl.load("demo", device="cuda")
    runtime.generate("Once", max_tokens=8)
    runtime.close()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.gpu
def test_the_sanitizer_finds_nothing() -> None:
    """Bounds of global and shared memory; `eval hardware` runs it over more tests."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH")
    if os.environ.get("EXL_SANITIZED"):
        pytest.skip("inside of it already")
    tests = str(Path(__file__).parent / "test_rows.py")
    done = subprocess.run(
        [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu", tests],
        env={**os.environ, "EXL_SANITIZED": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]

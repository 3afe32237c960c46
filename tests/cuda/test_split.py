"""One model over several devices: the plan from numbers, and a tiny model with layers on each of two backends."""

from pathlib import Path
from weakref import WeakValueDictionary

import pytest
import torch
from driving import batch_of, open_model, run
from fakes import Clock, FakeDetokenizer
from oracles import assert_as_good_as
from quantize import quantize_folder
from tiny import by_name, write

from exl_runtime.cache.geometry import PAGE_SIZE
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP16, cache_type
from exl_runtime.checkpoint.reader import Checkpoint
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.errors import NonFiniteError, OutOfMemory, UsageError
from exl_runtime.generation.generator import Generator
from exl_runtime.generation.request import Request
from exl_runtime.model.placement import geometry_of, working_bytes
from exl_runtime.model.split import GIB, Room, Sizes, Stage, context_for, measure, parse_split, plan_stages, rooms
from exl_runtime.model.split_model import Bridge, SplitCache, SplitTransformer, load_split
from exl_runtime.model.summary import stored_weights
from exl_runtime.ops.linear import workspace_cuda
from exl_runtime.sampling.params import SamplingParams

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", i) for i in range(3)]
# 9 in front: with the 14 of the formula two experts of mixtral are 3e-5 apart, and any rounding may choose the other.
IDS = [9, *((7 * i * i + 3 * i + 11) % 128 + 3 for i in range(1, 30))]
SIZES = Sizes(embedding=100, layers=(50,) * 10, head=120, cache_per_layer=10, working=5)


def room(index: int, nbytes: int) -> Room:
    return Room(GPUS[index], "cuda", nbytes)


HOST = Room(CPU, "cpu", 10**6)


# The plan


def test_what_fits_on_one_device_stays_there() -> None:
    (stage,) = plan_stages(SIZES, [room(0, 1000), room(1, 1000), HOST])
    assert (stage.device, stage.backend, stage.first, stage.stop) == (GPUS[0], "cuda", 0, 10)
    assert stage.nbytes == SIZES.stage(0, 10) == int((500 + 220) * 1.03) + 100 + 5


def test_layers_are_dealt_in_order_and_the_rest_goes_to_the_host() -> None:
    stages = plan_stages(SIZES, [room(0, 300), room(1, 200), HOST])
    assert [(s.device, s.first, s.stop) for s in stages] == [(GPUS[0], 0, 3), (GPUS[1], 3, 6), (CPU, 6, 10)]
    for stage, limit in zip(stages, (300, 200, 10**6), strict=True):
        assert stage.nbytes <= limit
    # One layer more would have been too much, everywhere but at the end.
    assert SIZES.stage(0, 4) > 300 and SIZES.stage(3, 7) > 200


def test_the_head_counts_where_the_last_layer_is() -> None:
    enough = SIZES.stage(0, 10)
    assert len(plan_stages(SIZES, [room(0, enough), HOST])) == 1
    stages = plan_stages(SIZES, [room(0, enough - 1), HOST])
    assert [(s.first, s.stop) for s in stages] == [(0, 9), (9, 10)]


def test_a_device_too_small_for_a_layer_is_left_out() -> None:
    stages = plan_stages(SIZES, [room(0, 20), room(1, 1000), HOST])
    assert [s.device for s in stages] == [GPUS[1]]
    (stage,) = plan_stages(SIZES, [room(0, 0), HOST])
    assert stage.device == CPU and stage.backend == "cpu"


def test_no_room_at_all_says_what_is_missing() -> None:
    with pytest.raises(OutOfMemory, match=r"7 of its 10 layers are left for cpu") as caught:
        plan_stages(SIZES, [room(0, 300), Room(CPU, "cpu", 100)])
    assert "--cache" in str(caught.value)


def test_shares_are_read_and_refused() -> None:
    assert parse_split("auto") is None and parse_split("20,24.5,0") == (20.0, 24.5, 0.0)
    for bad in ("", "a", "20,,3", "-1,2", "0,0", "nan", "inf"):
        with pytest.raises(UsageError, match="gpu_split"):
            parse_split(bad)


def test_rooms_are_what_is_free_or_what_was_allowed() -> None:
    free = {GPUS[0]: 10 * GIB, GPUS[1]: 4 * GIB, CPU: 20 * GIB}.__getitem__
    auto = rooms("auto", GPUS[:2], free=free)
    assert [(r.device, r.backend) for r in auto] == [(GPUS[0], "cuda"), (GPUS[1], "cuda"), (CPU, "cpu")]
    assert [r.nbytes for r in auto] == [int(10 * GIB * 0.92), int(4 * GIB * 0.92), 19 * GIB]
    # More than is free is not given; 0 leaves a card out; cards that are not named are left out.
    assert [r.nbytes for r in rooms("2,24", GPUS[:2], free=free)] == [2 * GIB, int(4 * GIB * 0.92), 19 * GIB]
    assert [r.device for r in rooms("0,1", GPUS[:2], free=free)] == [GPUS[1], CPU]
    assert [r.device for r in rooms("3", GPUS[:2], free=free)] == [GPUS[0], CPU]
    with pytest.raises(UsageError, match="names 3 GPUs, this machine has 2"):
        rooms("1,1,1", GPUS[:2], free=free)
    with pytest.raises(UsageError, match="needs a GPU"):
        rooms("auto", [], free=free)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


def folder_of(root: Path, name: str = "llama") -> Path:
    folder = root / f"{name}-exl2"
    if not folder.exists():
        quantize_folder(write(by_name(name), root), folder, "exl2")
    return folder


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3"])
def test_sizes_from_headers_are_those_of_info(root, name) -> None:
    folder = folder_of(root, name)
    spec = resolve(load_config(folder).config, {})
    with Checkpoint.open(folder) as checkpoint:
        sizes = measure(checkpoint, spec, cache=FP16, context=1000)
        whole = stored_weights(checkpoint, spec).nbytes
    assert abs(sum(sizes.layers) + sizes.embedding + sizes.head - whole) <= len(spec.layers) * 64
    assert len(set(sizes.layers)) > 1 and min(sizes.layers) > 0  # different widths
    assert sizes.cache_per_layer == 5 * PAGE_SIZE * spec.kv_heads * spec.head_dim * 2 * 2
    with Checkpoint.open(folder) as checkpoint:
        small = measure(checkpoint, spec, cache=cache_type("q4"), context=1000)
    assert small.cache_per_layer < sizes.cache_per_layer / 3


def test_the_workspace_of_the_kernels_is_planned_for(emulated, root, monkeypatch) -> None:
    monkeypatch.setattr(workspace_cuda, "_workspaces", WeakValueDictionary())
    folder = folder_of(root)
    spec = resolve(load_config(folder).config, {})
    with Checkpoint.open(folder) as checkpoint:
        sizes = measure(checkpoint, spec, cache=FP16, context=1000)
    model = open_model(folder, "cuda", torch.float16)
    space = workspace_cuda.workspace(torch.device("cpu"))
    held = (space.partials, space.tickets, space.staged, space.factors, space.panel, *space.outgrown)
    assert working_bytes(spec) + sum(t.nbytes for t in held) <= sizes.working
    widest = max(linear.kernel.matrix.inputs for block in model.blocks for linear in block.linears)
    exact = workspace_cuda.workspace_bytes(widest, space.processors)
    padding = 2 * workspace_cuda.MOST_ROWS * 32 * 8
    assert exact <= sum(t.nbytes for t in held[: -1 if space.outgrown else None]) + padding


def test_the_context_is_what_the_tightest_device_holds(root) -> None:
    spec = resolve(load_config(folder_of(root)).config, {})
    geometry = geometry_of(spec, FP16)
    per_layer = geometry.bytes_per_page // geometry.layers
    stages = (Stage(GPUS[0], "cuda", 0, 2, 0), Stage(CPU, "cpu", 2, 3, 0))
    base = working_bytes(spec)
    free = {GPUS[0]: base + int(per_layer * 2 * 2.01 / 0.8) + 1, CPU: base + per_layer * 100}
    assert context_for(spec, stages, cache=FP16, free=free.__getitem__) == PAGE_SIZE
    free[GPUS[0]] = base + per_layer * 1000
    assert context_for(spec, stages, cache=FP16, free=free.__getitem__) == spec.context_length
    free[CPU] = base
    with pytest.raises(OutOfMemory, match="free on cpu: too little for keys and values of 1 layers"):
        context_for(spec, stages, cache=FP16, free=free.__getitem__)


# The bridge


def test_a_bridge_that_damages_what_it_carries_is_not_used(caplog) -> None:
    meta = torch.device("meta")  # stands for a card, in tests of what is decided

    def broken(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=x.dtype)

    def good(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.arange(x.numel(), dtype=torch.int32) * 2654435 + 12345

    def raising(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise RuntimeError("peer access is not supported between these two devices")

    assert Bridge(GPUS[0], CPU, copy=broken).direct  # the host is always reached
    assert Bridge(meta, meta, copy=broken).direct  # nothing to cross
    for copy, direct in ((broken, False), (raising, False), (good, True)):
        bridge = Bridge(meta, torch.device("cuda", 7), copy=copy)
        assert bridge.direct is direct
    assert sum("by way of the host" in record.message for record in caplog.records) == 2


def test_a_bridge_by_the_host_carries_the_same(monkeypatch) -> None:
    bridge = Bridge(CPU, CPU)
    x = torch.randn(3, 5)
    assert torch.equal(bridge(x), x)
    bridge.direct = False
    assert torch.equal(bridge(x), x)


# Two backends in one model


def open_split(folder: Path, cut: int, *, backends=("cuda", "cpu")) -> SplitTransformer:
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    stages = (Stage(CPU, backends[0], 0, cut, 0), Stage(CPU, backends[1], cut, len(spec.layers), 0))
    done: list[tuple[int, int]] = []
    with Checkpoint.open(folder) as checkpoint:
        model = load_split(
            checkpoint, spec, stages, quantization=files.quantization, progress=lambda i, n: done.append((i, n))
        )
    assert done == [(i + 1, len(spec.layers)) for i in range(len(spec.layers))]
    return model


def cache_of(model: SplitTransformer, pages: int = 6) -> SplitCache:
    return SplitCache(geometry_of(model.spec, FP16), pages, [part.stage for part in model.parts])


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("backends", [("cuda", "cpu"), ("cpu", "cuda")])
def test_half_on_each_backend_is_as_good_as_half_precision(emulated, root, name, backends) -> None:
    folder = folder_of(root, name)
    model = open_split(folder, 2, backends=backends)
    assert model.backend == "+".join(backends) and len(model.blocks) == 3
    kv = cache_of(model)
    ours = [model.forward(batch_of([(IDS[:12], 0, [2])]), kv), model.forward(batch_of([(IDS[12:], 12, [2])]), kv)]
    naive, wide = (open_model(folder, "reference", dtype) for dtype in (torch.float16, torch.float32))
    assert_as_good_as(torch.cat(ours), run(naive, IDS, []), run(wide, IDS, []).double(), factor=3.0)


def test_one_model_in_stages_of_one_backend_is_the_model(emulated, root) -> None:
    folder = folder_of(root)
    model, whole = open_split(folder, 1, backends=("cuda", "cuda")), open_model(folder, "cuda", torch.float16)
    kv = cache_of(model)
    other = KVStorage(geometry_of(whole.spec, FP16), 6, CPU)
    batch = batch_of([(IDS, 0, [1]), (IDS[:5], 0, [4])], all_logits=False)
    assert torch.equal(model.forward(batch, kv), whole.forward(batch, other))
    assert model.nbytes == whole.nbytes
    kv.copy_page(1, 3, 30)
    other.copy_page(1, 3, 30)
    step = batch_of([([9], 30, [3])])
    assert torch.equal(model.forward(step, kv), whole.forward(step, other))
    assert kv.nbytes == other.nbytes


def test_a_damaged_layer_is_named_and_closing_lets_go(emulated, root) -> None:
    model = open_split(folder_of(root), 2)
    model.blocks[2].norms.input[1] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 2"):
        model.forward(batch_of([(IDS[:4], 0, [0])]), cache_of(model))
    model.close()
    assert not model.parts and model.nbytes == 0


def test_the_generator_takes_it_for_one_model(emulated, root) -> None:
    model = open_split(folder_of(root), 2)

    class Tokenizer:
        eos_id = None
        special_ids = frozenset()

        def id_of(self, token: str) -> None:
            return None

        def detokenizer(self, skip_special: bool = True):
            return FakeDetokenizer()

    generator = Generator(model, cache_of(model), Tokenizer(), context=512, clock=Clock())
    params = SamplingParams(temperature=0)
    requests = [Request(prompt=(*IDS[:9], i), max_tokens=6, sampling=params) for i in range(2)]
    together = [result.ids for result in generator.run(requests)]
    alone = [generator.run([request])[0].ids for request in requests]
    assert together == alone and all(len(ids) >= 1 for ids in together)

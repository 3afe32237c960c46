"""Layers in groups with pages of their own: on several devices, beside a second model, where a pass is recorded."""

from dataclasses import replace

import pytest
import torch
from recording import FakeRecorder

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import FP16, FP32
from exl_runtime.config.read import load_config
from exl_runtime.config.resolve import resolve
from exl_runtime.config.spec import ModelSpec
from exl_runtime.model.graph import DecodeGraphs, Row
from exl_runtime.model.placement import auto_context, cache_pages, geometry_beside, geometry_of, held_bytes
from exl_runtime.model.split import Stage
from exl_runtime.model.split_model import SplitCache
from exl_runtime.runtime.load import DEMO_FOLDER

CPU = torch.device("cpu")
WINDOWS = (6, None, 6, 6, None)


def spec_of(windows: tuple[int | None, ...]) -> ModelSpec:
    spec = resolve(load_config(DEMO_FOLDER).config | {"num_hidden_layers": len(windows)})
    layers = tuple(replace(layer, window=window) for layer, window in zip(spec.layers, windows, strict=True))
    return replace(spec, layers=layers, context_length=1 << 16)


def test_every_device_has_the_groups_of_its_layers() -> None:
    geometry = CacheGeometry(5, 1, 4, FP32, 4, WINDOWS)
    stages = [Stage(CPU, "cpu", 0, 1, 0), Stage(CPU, "cpu", 1, 5, 0)]
    split, whole = SplitCache(geometry, (7, 3), stages), KVStorage(geometry, (7, 3), CPU)
    assert split.nbytes == whole.nbytes and split.counts == whole.counts
    assert [split.layer(i)[0].shape for i in range(5)] == [whole.layer(i)[0].shape for i in range(5)]
    for i in range(5):
        split.layer(i)[0][1] = i + 1.0
    split.copy_page(1, 2, 4, 1)
    assert [float(split.layer(i)[0][2].mean()) for i in range(5)] == [1.0, 0.0, 3.0, 4.0, 0.0]
    split.copy_page(1, 2, 4, 0)
    assert [float(split.layer(i)[0][2].mean()) for i in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_second_model_takes_the_pages_that_are_enough_for_it() -> None:
    main = geometry_of(spec_of((4096, None)), FP16, 1 << 15)
    beside = {
        (512, None, 512): (4096, None, 4096),
        (4096, None): (4096, None),
        (None, None): None,  # nothing to do with the pages of a window
        (8192, None): None,  # a window that is wider keeps all
        (512, 512): None,
    }
    for windows, shares in beside.items():
        found = geometry_beside(main, spec_of(windows), FP32)
        assert (None if found is None else found.windows) == shares
    plain = geometry_of(spec_of((4096, None)), FP16)
    assert plain.windows == () and geometry_beside(plain, spec_of((64, None)), FP32).windows == ()
    assert geometry_beside(geometry_of(spec_of((4096,)), FP16, 1 << 15), spec_of((None,)), FP32) is None


def test_memory_of_a_long_context_follows_the_layers_that_see_it() -> None:
    mixed, full = spec_of((512, 512, 512, 512, 512, None)), spec_of((None,) * 6)
    for context in (512, 4096, 1 << 16):
        ours, theirs = (held_bytes(geometry_of(spec, FP16, context), context) for spec in (mixed, full))
        assert ours == theirs if context == 512 else ours < theirs
    assert ours < theirs * 0.19
    free = 64 << 20
    lengths = [auto_context(spec, cache=FP16, device=CPU, free=free) for spec in (mixed, full)]
    assert lengths[0] > 4 * lengths[1]
    for spec, context in zip((mixed, full), lengths, strict=True):
        geometry = geometry_of(spec, FP16, context)
        pages = cache_pages(geometry, context, device=CPU, free=free)
        assert all(type(count) is int for count in pages) and len(pages) == len(geometry.groups)


class Recordable:
    """As much of a model as is asked before anything is recorded."""

    spec, device = spec_of((None,)), CPU

    def why_not_recorded(self, kv: object) -> None:
        return None


@pytest.mark.parametrize(("windows", "says"), [((6, None), "pages of their own"), ((6, 6), None), ((), None)])
def test_recorded_steps_know_one_group(windows: tuple[int | None, ...], says: str | None) -> None:
    kv = KVStorage(CacheGeometry(2, 1, 4, FP32, 4, windows), 5, CPU)
    graphs = DecodeGraphs(Recordable(), kv, None, FakeRecorder())
    why = graphs.refuses([Row(owner=1, token=3, length=4, pages=[0, 1], rope_length=0, slot=0)])
    assert (why or "") == "" if says is None else says in str(why)

"""Snapshots: the same conversation goes on at once; foreign, damaged and short files never give a wrong token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import FakeSpec, Rig, expected, request

from exl_runtime.cache.geometry import CacheGeometry
from exl_runtime.cache.snapshot import Contents, Identity, Snapshot, pieces, snapshot_bytes
from exl_runtime.cache.storage import KVStorage
from exl_runtime.cache.types import cache_type
from exl_runtime.errors import StorageError

PROMPT = list(range(11))


def identity(rig: Rig) -> Identity:
    return Identity.of("model", "cpu float32 exact", rig.kv.geometry)


def write(rig: Rig, tokens: list[int], path: Path) -> int:
    with rig.generator.holding(tokens) as held:
        path.write_bytes(b"".join(bytes(piece) for piece in pieces(rig.kv, held, identity(rig))))
        count = len(held.tokens)
    rig.check()
    return count


def ask(rig: Rig, prompt: list[int], count: int = 4, seed: int = 0, rope_length: int = 0) -> int:
    (result,) = rig.generator.run([request(prompt, count, seed=seed)])
    rig.check()
    assert result.ids == tuple(expected(prompt, count, seed=seed, rope_length=rope_length))
    return result.reused_tokens


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, list[int]]:
    """A snapshot of a prompt and its reply, and their tokens: 14 computed, of 15."""
    rig, path = Rig(), tmp_path / "talk.json.kv"
    ask(rig, PROMPT)
    tokens = [*PROMPT, *expected(PROMPT, 4)]
    assert write(rig, tokens, path) == 14
    assert abs(path.stat().st_size - snapshot_bytes(rig.kv.geometry, 14)) <= 700
    return path, tokens


def opened(path: Path, **options: object) -> Rig:
    rig = Rig(**options)
    rig.generator.attach(Snapshot.open(path, identity(rig), rig.kv.geometry))
    return rig


def test_the_next_turn_computes_only_what_is_new(kept: tuple[Path, list[int]]) -> None:
    path, tokens = kept
    rig = opened(path)
    assert ask(rig, [*tokens, 30, 29], seed=1) == 14
    assert rig.model.passes[0] == [3]
    assert rig.generator.stats.disk_tokens == 14
    assert ask(rig, [*tokens, 30, 29], seed=2) == 16  # from the pages now
    assert rig.generator.stats.disk_tokens == 14


def test_the_same_turn_again_computes_one_token(kept: tuple[Path, list[int]]) -> None:
    rig = opened(kept[0])
    assert ask(rig, PROMPT, seed=3) == len(PROMPT) - 1
    assert rig.model.passes[0] == [1]


def test_a_cache_too_small_for_it_still_answers(kept: tuple[Path, list[int]]) -> None:
    path, tokens = kept
    rig = opened(path, pages=4)
    assert ask(rig, [30, *range(9)], 3) == 0
    assert ask(rig, tokens, 1) == 14
    assert ask(rig, [30, *range(9)], 3) == 0 and ask(rig, tokens, 1, seed=2) == 14  # read a second time


def test_pages_under_another_rope_are_not_those(tmp_path: Path) -> None:
    rig, path = Rig(spec=FakeSpec(rope_switch=12)), tmp_path / "long.kv"
    ask(rig, PROMPT, rope_length=15)
    assert write(rig, PROMPT, path) == len(PROMPT)
    again = opened(path, spec=FakeSpec(rope_switch=12))
    assert ask(again, PROMPT, 1) == 0  # planned shorter: the usual rope
    assert ask(again, PROMPT, 4, seed=1, rope_length=15) == len(PROMPT) - 1
    third = tmp_path / "third.kv"
    assert write(again, PROMPT, third) == len(PROMPT)


def test_a_removed_file_serves_on_until_it_is_let_go(kept: tuple[Path, list[int]]) -> None:
    path, _ = kept
    rig = Rig()
    snapshot = Snapshot.open(path, identity(rig), rig.kv.geometry)
    rig.generator.attach(snapshot)
    path.unlink()
    assert ask(rig, PROMPT) == 10
    rig.generator.detach(snapshot)
    rig.generator.detach(snapshot)
    snapshot.close()
    rig.table.clear()
    assert ask(rig, PROMPT) == 0 and rig.generator.stats.disk_tokens == 10


def test_everything_foreign_is_refused_by_name(kept: tuple[Path, list[int]]) -> None:
    path, _ = kept
    rig = Rig()
    ours, geometry = identity(rig), rig.kv.geometry
    for change, says in (
        ({"model": "other"}, "another model"),
        ({"computed": "cuda"}, "kernels"),
        ({"cache": "q8"}, "cache type fp32, not q8"),
        ({"page_size": 8}, "pages of 4 tokens, not 8"),
        ({"layers": 3}, "model or machine"),
        ({"order": "big"}, "model or machine"),
    ):
        with pytest.raises(StorageError, match=says) as caught:
            Snapshot.open(path, replace(ours, **change), geometry)
        assert "\n" not in caught.value.problem and path.name in caught.value.problem
    for text in (b"", b"{}", b"x" * 4000):
        path.write_bytes(text)
        with pytest.raises(StorageError, match="not a snapshot"):
            Snapshot.open(path, ours, geometry)
    with pytest.raises(StorageError, match="cannot be read"):
        Snapshot.open(path.with_name("none"), ours, geometry)


def test_every_shorter_file_is_refused(kept: tuple[Path, list[int]]) -> None:
    path, _ = kept
    rig, whole = Rig(), path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError):
            Snapshot.open(path, identity(rig), rig.kv.geometry)


def test_no_flipped_bit_gives_a_wrong_token(kept: tuple[Path, list[int]], caplog: pytest.LogCaptureFixture) -> None:
    """Refused when opened, or computed anew from the damaged page on: `ask` compares with the oracle."""
    path, tokens = kept
    whole, refused, partly = path.read_bytes(), 0, 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            rig = opened(path)
        except StorageError as err:
            assert "\n" not in err.problem
            refused += 1
            continue
        partly += ask(rig, [*tokens, 30], 2) < 14
        assert ask(rig, [*tokens, 30], 2, seed=1) == 15
    inside = [place for place in range(0, len(whole), 3) if 16 <= place < 16 + 14 * 16]  # of 14 tokens, 16 bytes each
    assert partly == len(inside) and refused == len(range(0, len(whole), 3)) - partly
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "q8", "q6", "q4", "k6v4"])
def test_all_types_bit_by_bit(name: str, tmp_path: Path) -> None:
    geometry = CacheGeometry(2, 2, 64, cache_type(name), 8)
    kv = KVStorage(geometry, 3, torch.device("cpu"))
    for tensor in (kv.keys, kv.values):
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))
    ours, path = Identity.of("m", "c", geometry), tmp_path / "a.kv"
    contents = Contents(bytes(16), tuple(range(11)), [(2, 0)])
    path.write_bytes(b"".join(bytes(piece) for piece in pieces(kv, contents, ours)))
    snapshot = Snapshot.open(path, ours, geometry)
    for slot, (page, tokens) in enumerate(((2, 8), (0, 3))):
        node = snapshot.tiers[0].node(slot)
        assert node is not None and node.tokens == tokens
        (image,) = snapshot.tiers[0]._loader(slot)()
        layers = [part[page, :tokens] for layer in range(2) for part in kv.layer(layer)]
        assert torch.equal(image, torch.cat([part.reshape(-1).view(torch.uint8) for part in layers]))
    with pytest.raises(StorageError, match="cache type"):
        other = CacheGeometry(2, 2, 64, cache_type("k7v7"), 8)
        Snapshot.open(path, Identity.of("m", "c", other), other)

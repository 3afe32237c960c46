"""Reading whole folders: against the safetensors library, from threads, in groups, past files that do not belong."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_runtime.checkpoint import Checkpoint, reader
from exl_runtime.checkpoint.header import ITEM_BYTES
from exl_runtime.checkpoint.reader import DTYPES
from exl_runtime.errors import CheckpointError, OutOfMemory

INDEX = "model.safetensors.index.json"
ALL = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def random_bytes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"t.{i}": random_bytes(dtype, 3, 5) for i, dtype in enumerate(ALL)}
    tensors |= {"scalar": torch.tensor(1.5, dtype=torch.bfloat16), "none": torch.zeros(0, 7), "one": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = load_file(tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names == set(tensors)
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in theirs.items():
            read = checkpoint.tensor(name)
            assert same_bits(read, tensor), name
            assert read.is_contiguous()
            info = checkpoint.info(name)
            assert info.shape == tuple(tensor.shape)
            assert DTYPES[info.dtype] == tensor.dtype
            assert info.nbytes == tensor.nbytes
            assert info.file == tmp_path / "model.safetensors"
    assert {DTYPES[name].itemsize for name in ITEM_BYTES} == set(ITEM_BYTES.values())
    assert all(DTYPES[name].itemsize == size for name, size in ITEM_BYTES.items())


def test_offsets_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    tensor = torch.arange(7, dtype=torch.int32)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    info = Checkpoint.open(tmp_path).info("a")
    assert (tmp_path / "model.safetensors").read_bytes()[info.start : info.stop] == tensor.numpy().tobytes()


def test_odd_alignment(tmp_path: Path) -> None:
    """Nothing promises that a float32 tensor begins at a multiple of four."""
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        }
    ).encode()
    values = torch.tensor([1.25, -3.5], dtype=torch.float64)
    data = b"\7" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert torch.equal(Checkpoint.open(tmp_path).tensor("b"), values)


def test_tensors_belong_to_the_caller(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        first = checkpoint.tensor("a")
        first.zero_()
        assert torch.equal(checkpoint.tensor("a"), torch.ones(4))
    assert torch.equal(first, torch.zeros(4))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))


def test_one_row_of_a_stack(tmp_path: Path) -> None:
    stack = torch.randn(5, 3, 2)
    save_file({"a": stack, "b": torch.tensor(1.0), "c": torch.zeros(3, 0)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for row in range(5):
            assert torch.equal(checkpoint.tensor("a", row=row), stack[row])
        assert checkpoint.tensor("c", row=2).shape == (0,)
        for name, row in (("a", 5), ("a", -1), ("b", 0)):
            with pytest.raises(CheckpointError, match=f"{name} in model.safetensors: .* no row {row}"):
                checkpoint.tensor(name, row=row)


def test_a_part_of_the_rows_into_memory_that_is_given(tmp_path: Path) -> None:
    stack = random_bytes(torch.bfloat16, 3, 7, 5)
    save_file({"stack": stack}, tmp_path / "model.safetensors")
    room = torch.zeros(1000, dtype=torch.uint8)
    with Checkpoint.open(tmp_path) as checkpoint:
        for start, stop in ((0, 7), (2, 5), (6, 7), (4, 4)):
            found = checkpoint.tensor("stack", row=1, part=(start, stop), room=lambda nbytes: room[:nbytes])
            assert same_bits(found, stack[1, start:stop])
            assert found.numel() == 0 or found.data_ptr() == room.data_ptr()
        assert same_bits(checkpoint.tensor("stack", part=(1, 3)), stack[1:3])
        for wrong in ((-1, 2), (3, 2), (0, 8)):
            with pytest.raises(CheckpointError, match=f"no part {wrong[0]} to {wrong[1]}"):
                checkpoint.tensor("stack", row=1, part=wrong)


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE", 64)
    tensors = {f"t.{size}": random_bytes(torch.uint8, size) for size in (0, 1, 63, 64, 65, 640, 1001)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert same_bits(checkpoint.tensor(name), tensor)
        with open(tmp_path / "model.safetensors", "r+b") as handle:
            handle.truncate(1500)
        with pytest.raises(CheckpointError, match=r"ends inside tensor t\."):
            for name in tensors:
                checkpoint.tensor(name)


def test_bytes_that_are_no_bool(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([True, False, True])}, tmp_path / "model.safetensors")
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] = 7
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Checkpoint.open(tmp_path).tensor("a").view(torch.uint8).tolist() == [1, 0, 1]


def test_shards(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(3, 3) for i in range(4)}
    names = list(tensors)
    for part in (0, 1):
        chosen = {name: tensors[name] for name in names[part::2]}
        save_file(chosen, tmp_path / f"model-0000{part + 1}-of-00002.safetensors")
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert [file.name for file in checkpoint.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
        assert checkpoint.where("layer.1.weight") == "layer.1.weight in model-00002-of-00002.safetensors"


def test_many_threads_read_the_right_bytes(tmp_path: Path) -> None:
    tensors = {f"t.{i}": torch.full((200, 50), i, dtype=torch.int32) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    wrong: list[str] = []
    with Checkpoint.open(tmp_path) as checkpoint:

        def work(offset: int) -> None:
            for i in range(100):
                name = f"t.{(i * 7 + offset) % 20}"
                if not torch.equal(checkpoint.tensor(name), tensors[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_missing_tensor_names_the_nearest(tmp_path: Path) -> None:
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)},
        tmp_path / "m.safetensors",
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.tensor("model.layers.0.mlp.up_proj.wait")
        assert "model.layers.0.mlp.up_proj.wait" in str(caught.value)
        assert "nearest names: model.layers.0.mlp.up_proj.weight" in str(caught.value)
        assert "m.safetensors" in str(caught.value)
        with pytest.raises(CheckpointError, match=r"matrix model\.layers\.0\.mlp\.up .*up_proj"):
            checkpoint.group("model.layers.0.mlp.up")
        for ask in (checkpoint.info, checkpoint.where):
            with pytest.raises(CheckpointError, match="is in no file"):
                ask("nothing like it")


def test_groups(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{path}.q_weight": torch.ones(2, dtype=torch.int32),
            f"{path}.q_scale": torch.zeros(3),
            f"{path}.a.b": torch.ones(1),
        },
        tmp_path / "output-00001-of-00002.safetensors",
    )
    save_file(
        {f"{path}.bias": torch.ones(4), f"{path}2.bias": torch.ones(5)}, tmp_path / "output-00002-of-00002.safetensors"
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.suffixes(path) == {"q_weight", "q_scale", "bias"}
        assert checkpoint.suffixes(f"{path}.a") == {"b"}
        assert checkpoint.suffixes("model.layers.0") == frozenset()
        group = checkpoint.group(path)
        assert set(group) == {"q_weight", "q_scale", "bias"}
        assert len(group) == 3
        assert "bias" in group
        assert "weight" not in group
        assert group.get("weight") is None
        assert group.path == path
        assert group.where == f"{path} in output-00001-of-00002.safetensors and output-00002-of-00002.safetensors"
        assert group.infos["q_weight"].shape == (2,)
        assert torch.equal(group["bias"], torch.ones(4))
        assert group["bias"] is group["bias"]
        with pytest.raises(KeyError):
            group["weight"]
    with pytest.raises(CheckpointError, match="closed"):
        group["q_weight"]


def test_closing(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    tensor = checkpoint.tensor("a")
    checkpoint.close()
    checkpoint.close()
    assert torch.equal(tensor, torch.ones(2))
    assert checkpoint.has("a")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("a")


def test_file_changes_while_loading(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(1000)}, file)
    opened = Checkpoint.open(tmp_path)
    opened.tensor("a.weight")
    unread = Checkpoint.open(tmp_path)
    with open(file, "r+b") as handle:
        handle.truncate(500)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside tensor a\.weight"):
        opened.tensor("a.weight")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file changed"):
        unread.tensor("a.weight")


def test_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    save_file({"a.weight": torch.ones(10)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor a\.weight cannot be read: Input/output error"
    ):
        checkpoint.tensor("a.weight")


def test_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    save_file({"a.weight": torch.ones(10)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(OutOfMemory, match=r"a\.weight in model\.safetensors: no memory for its 40 bytes"):
        checkpoint.tensor("a.weight")


# --- files that do not belong ------------------------------------------------------------------------------------


def put(folder: Path, name: str, *tensors: str) -> None:
    save_file({tensor: torch.zeros(2, 2) for tensor in tensors}, folder / name)


def test_duplicates_under_other_names_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "model.norm.weight")
    put(tmp_path, "consolidated.safetensors", "norm.weight")
    put(tmp_path, "consolidated-00001-of-00005.safetensors", "norm.weight")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken, and of no interest")
    (tmp_path / "._model.safetensors").write_bytes(b"a file manager's notes")
    (tmp_path / "model.safetensors.part").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert Checkpoint.open(tmp_path).names == {"model.norm.weight"}


def test_consolidated_alone_is_read(tmp_path: Path) -> None:
    put(tmp_path, "consolidated.safetensors", "norm.weight")
    assert Checkpoint.open(tmp_path).names == {"norm.weight"}


@pytest.mark.parametrize("index", ['{"weight_map": {"gone.weight": "model-00002-of-00002.safetensors"}}', "{", "[]"])
def test_exl2_never_looks_at_an_index(index: str, tmp_path: Path) -> None:
    put(tmp_path, "output.safetensors", "model.layers.0.mlp.up_proj.q_weight")
    (tmp_path / INDEX).write_text(index)
    assert len(Checkpoint.open(tmp_path).names) == 1


def test_gptq_beside_the_index_of_its_source(tmp_path: Path) -> None:
    put(tmp_path, "gptq_model-4bit-128g.safetensors", "a.qweight", "norm.weight")
    (tmp_path / INDEX).write_text('{"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}')
    assert len(Checkpoint.open(tmp_path).names) == 2


def test_renamed_file_beside_an_old_index(tmp_path: Path) -> None:
    put(tmp_path, "merged.safetensors", "a.weight", "b.weight")
    listed = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    assert len(Checkpoint.open(tmp_path).names) == 2


def test_an_index_that_names_fewer_files_than_their_names_count(tmp_path: Path) -> None:
    """Some uploads drop a shard on purpose (a vision tower); their index says so."""
    put(tmp_path, "model-00001-of-00002.safetensors", "a.weight")
    (tmp_path / INDEX).write_text('{"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}')
    assert len(Checkpoint.open(tmp_path).names) == 1


def test_shards_counted_from_zero(tmp_path: Path) -> None:
    put(tmp_path, "model-00000-of-00002.safetensors", "a.weight")
    put(tmp_path, "model-00001-of-00002.safetensors", "b.weight")
    assert len(Checkpoint.open(tmp_path).names) == 2


def test_the_bundled_models(demo: Path, ember: Path) -> None:
    for folder in (demo, ember):
        with Checkpoint.open(folder) as checkpoint:
            for file in checkpoint.files:
                for name, tensor in load_file(file).items():
                    assert same_bits(checkpoint.tensor(name), tensor), name

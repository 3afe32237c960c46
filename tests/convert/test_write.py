"""The finished folder: shards, config.json, what is copied, and names that are given only at the end."""

import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert import write
from convert.encoded import Encoded, stored_shapes
from convert.write import copied_files, plan_shards, prepare_target, publish, quantization_config, write_folder
from exl_runtime.checkpoint import Checkpoint
from exl_runtime.checkpoint.writer import Planned
from exl_runtime.config import load_config
from exl_runtime.errors import ConvertError, StorageError

QUANTIZATION = quantization_config(version="0.1.0", bits=4, head_bits=6, rows=100, length=2048, dataset="text.txt")


def sized(*sizes: int) -> list[Planned]:
    """Byte tensors of these sizes, named in order."""
    return [
        Planned(
            name=f"t{number}",
            dtype=torch.uint8,
            shape=(size,),
            make=lambda size=size, number=number: torch.full((size,), number, dtype=torch.uint8),
        )
        for number, size in enumerate(sizes)
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def source_folder(path: Path, *files: str, config: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text(f"content of {name}")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def save(target: Path, source: Path, tensors: list[Planned], shard_bytes: int = 0) -> list[Path]:
    config = json.loads((source / "config.json").read_text())
    return write_folder(target, source, tensors, shard_bytes=shard_bytes, config=config, quantization=QUANTIZATION)


# --- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((8, 8, 8), 0, [[0, 1, 2]]),
        ((8, 8, 8), 24, [[0, 1, 2]]),
        ((8, 8, 8), 23, [[0, 1], [2]]),
        ((8, 8, 8), 1, [[0], [1], [2]]),
        ((8, 100, 8, 8), 16, [[0], [1], [2, 3]]),
        ((100, 8), 16, [[0], [1]]),
        ((8, 0, 100), 8, [[0, 1], [2]]),
        ((), 16, [[]]),
    ],
)
def test_shards(sizes: tuple[int, ...], limit: int, expected: list[list[int]]) -> None:
    shards = plan_shards(sized(*sizes), limit)
    assert [[int(entry.name[1:]) for entry in shard] for _, shard in shards] == expected
    total = len(expected)
    wanted = [f"output-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    assert [name for name, _ in shards] == (["output.safetensors"] if total == 1 else wanted)


def test_two_tensors_of_one_name_even_in_different_shards() -> None:
    with pytest.raises(ValueError, match="same name"):
        plan_shards(sized(8) + sized(8), 8)


@pytest.mark.parametrize("limit", [0, 100])
def test_a_folder_that_readers_accept(limit: int, tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", "tokenizer.json", config={"hidden_size": 8})
    tensors = sized(64, 3, 64, 250, 7, 32)
    files = save(tmp_path / "out", source, tensors, limit)
    assert len(files) == (1 if limit == 0 else 4)
    assert names(tmp_path / "out") == sorted(["config.json", "tokenizer.json", *(path.name for path in files)])
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.files == tuple(files)
        for entry in tensors:
            assert torch.equal(checkpoint.tensor(entry.name), entry.make())
    loaded = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert all(torch.equal(loaded[entry.name], entry.make()) for entry in tensors)
    assert load_config(tmp_path / "out").quantization == QUANTIZATION


def test_the_demo_encoded_again_is_the_same_model(demo: Path, tmp_path: Path) -> None:
    """Every matrix of a real model through `Encoded`, planned from its layout alone, into shards of another size."""
    with Checkpoint.open(demo) as checkpoint:
        plan: list[Planned] = []
        for name in sorted(checkpoint.names):
            path, _, suffix = name.rpartition(".")
            if not suffix.startswith("q_"):
                info = checkpoint.tensor(name)
                plan.append(
                    Planned(
                        name=name, dtype=info.dtype, shape=tuple(info.shape), make=lambda n=name: checkpoint.tensor(n)
                    )
                )
            elif suffix == "q_weight":
                stored = {part: checkpoint.tensor(f"{path}.{part}") for part in checkpoint.suffixes(path)}
                matrix = Encoded.from_tensors(stored, stored["q_weight"].shape[1])
                plan += [
                    Planned(
                        name=f"{path}.{part}", dtype=dtype, shape=shape, make=lambda m=matrix, p=part: m.tensors()[p]
                    )
                    for part, (dtype, shape) in stored_shapes(matrix.layout, matrix.outputs).items()
                ]
        config = json.loads((demo / "config.json").read_text())
        files = write_folder(
            tmp_path / "out",
            demo,
            plan,
            shard_bytes=700_000,
            config=config,
            quantization=config["quantization_config"],
        )
        assert len(files) > 5
        with Checkpoint.open(tmp_path / "out") as written:
            assert written.names == checkpoint.names and written.total_bytes == checkpoint.total_bytes
            for name in checkpoint.names:
                assert torch.equal(written.tensor(name), checkpoint.tensor(name)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    same = {path.name for path in demo.iterdir() if path.suffix != ".safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == same | {path.name for path in files}


def test_tensors_are_made_in_order_and_one_at_a_time(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    alive: list[weakref.ref[np.ndarray]] = []

    def make(number: int) -> torch.Tensor:
        assert number == len(alive) and all(ref() is None for ref in alive)
        memory = np.full(16, number, dtype=np.int32)
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    plan = [Planned(name=f"t{n}", dtype=torch.int32, shape=(16,), make=lambda number=n: make(number)) for n in range(6)]
    files = save(tmp_path / "out", source, plan, 128)
    assert len(files) == 3 and load_file(files[2])["t5"][0] == 5


def test_an_earlier_attempt_leaves_no_shards_behind(tmp_path: Path) -> None:
    """With 3 shards of a first and 2 of a second attempt in one folder, a reader would miss files or see doubles."""
    source = source_folder(tmp_path / "source", "README.md")
    out = tmp_path / "out.partial"
    save(out, source, sized(8, 8, 8), 8)
    (out / "output-00003-of-00003.safetensors.partial").write_bytes(b"cut")
    files = save(out, source, sized(8, 8), 8)
    assert names(out) == ["README.md", "config.json", *(path.name for path in files)]
    files = save(out, source, sized(8, 8))
    assert names(out) == ["README.md", "config.json", "output.safetensors"]


def test_no_config_while_tensors_are_missing(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", "tokenizer.json")

    def fail() -> torch.Tensor:
        raise RuntimeError("no")

    plan = [*sized(8), Planned(name="x", dtype=torch.uint8, shape=(8,), make=fail)]
    with pytest.raises(RuntimeError):
        save(tmp_path / "out", source, plan, 8)
    assert names(tmp_path / "out") == ["output-00001-of-00002.safetensors"]


def test_too_small_a_disk_is_noticed_before_writing(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", "tokenizer.json")
    plan = [Planned(name="x", dtype=torch.uint8, shape=(2**60,), make=lambda: torch.zeros(0))]
    with pytest.raises(StorageError, match="the finished model needs"):
        save(tmp_path / "out", source, plan)
    assert names(tmp_path / "out") == []


# --- config.json -------------------------------------------------------------------------------------------------


def test_config_changes_in_two_places_only(tmp_path: Path) -> None:
    config = {
        "architectures": ["X"],
        "torch_dtype": "bfloat16",
        "dtype": "float32",
        "quantization_config": {"quant_method": "gptq", "bits": 3},
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "text_config": {"torch_dtype": "bfloat16", "hidden_size": 8, "dtype": None},
        "name": "ü",
        "rms_norm_eps": 1e-05,
    }
    source = source_folder(tmp_path / "source", config=config)
    save(tmp_path / "out", source, sized(8))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {
        **config,
        "torch_dtype": "float16",
        "dtype": "float16",
        "quantization_config": QUANTIZATION,
        "text_config": {"torch_dtype": "float16", "hidden_size": 8, "dtype": None},
    }
    assert list(written) == list(config)
    assert json.loads((source / "config.json").read_text()) == config


def test_config_that_states_no_dtype_gets_none(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", config={"a": 1})
    save(tmp_path / "out", source, sized(8))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"a": 1, "quantization_config": QUANTIZATION}


def test_quantization_config_has_the_keys_of_the_format(demo: Path) -> None:
    like = json.loads((demo / "config.json").read_text())["quantization_config"]
    assert QUANTIZATION.keys() == like.keys() and QUANTIZATION["calibration"].keys() == like["calibration"].keys()
    assert isinstance(QUANTIZATION["bits"], float)


# --- copied files ------------------------------------------------------------------------------------------------

COPIED = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "x.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE", "NOTICE"),
    *("USE_POLICY.md", "tekken.json", "LICENSE.txt"),
]
LEFT = [
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "Model.SafeTensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt", "consolidated.00.pth", "x.gguf", "x.onnx"),
    *("quantize_config.json", "quant_config.json", "measurement.json", "report.json", "report.md", "report.html"),
    *(".gitattributes", ".hidden", "README.md.partial", "tf_model.h5", "flax_model.msgpack", "adapter_config.json"),
]


def test_what_is_copied(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", *COPIED, *LEFT)
    (source / "original").mkdir()
    (source / "original" / "tokenizer.model").write_text("x")
    (source / "folder.json").mkdir()
    os.mkfifo(source / "pipe.json")
    save(tmp_path / "out", source, sized(8))
    assert names(tmp_path / "out") == sorted([*COPIED, "config.json", "output.safetensors"])
    for name in COPIED:
        assert (tmp_path / "out" / name).read_text() == f"content of {name}"


def test_links_are_copied_as_their_content(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    (tmp_path / "blob").write_bytes(bytes(range(256)) * 10_000)  # more than one piece
    (source / "tokenizer.json").symlink_to("../blob")
    save(tmp_path / "out", source, sized(8))
    copy = tmp_path / "out" / "tokenizer.json"
    assert not copy.is_symlink() and copy.read_bytes() == (tmp_path / "blob").read_bytes()


def test_broken_link_is_named_before_any_work(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    (source / "tokenizer.json").symlink_to("../gone")
    (source / "pytorch_model.bin").symlink_to("../gone too")  # not copied, so nobody minds
    with pytest.raises(ConvertError, match=r"tokenizer\.json: a link to a file that does not exist"):
        prepare_target(tmp_path / "out", source)
    assert names(tmp_path) == ["source"]


def test_source_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=str(tmp_path / "gone")):
        copied_files(tmp_path / "gone")


# --- names -------------------------------------------------------------------------------------------------------


def test_prepare_and_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_folder(tmp_path / "source")
    partial = prepare_target(tmp_path / "new" / "deep" / "out", source)
    assert partial == tmp_path / "new" / "deep" / "out.partial" and names(partial) == []
    save(partial, source, sized(8))
    publish(partial, tmp_path / "new" / "deep" / "out")
    assert names(tmp_path / "new" / "deep") == ["out"]
    assert names(tmp_path / "new" / "deep" / "out") == ["config.json", "output.safetensors"]
    monkeypatch.chdir(tmp_path)
    assert prepare_target(Path("here"), Path("source")) == tmp_path / "here.partial"


def test_an_empty_target_is_replaced(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    partial = prepare_target(tmp_path / "link", source)
    (partial / "x").write_text("1")
    publish(partial, tmp_path / "link")
    assert names(tmp_path / "out") == ["x"] and (tmp_path / "link").is_symlink()


def test_prepare_keeps_what_an_earlier_run_left(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    partial = prepare_target(tmp_path / "out", source)
    (partial / "x").write_text("1")
    assert prepare_target(tmp_path / "out", source) == partial
    assert names(partial) == ["x"]


def refuse_target(tmp_path: Path, target: Path, words: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ConvertError, StorageError)) as caught:
        prepare_target(target, tmp_path / "source")
    assert words in caught.value.problem and "\n" not in caught.value.problem and caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("1")
    (tmp_path / "taken.partial").write_text("1")
    refuse_target(tmp_path, source, "is the source folder")
    refuse_target(tmp_path, tmp_path / "link", "is the source folder")
    refuse_target(tmp_path, tmp_path / "full" / ".." / "source", "is the source folder")
    refuse_target(tmp_path, source / "out", "inside the source folder")
    refuse_target(tmp_path, tmp_path / "link" / "deep" / "out", "inside the source folder")
    refuse_target(tmp_path, tmp_path, "not empty")
    refuse_target(tmp_path, tmp_path / "full", "it holds thesis.txt")
    refuse_target(tmp_path, tmp_path / "file", "a file has this name")
    refuse_target(tmp_path, tmp_path / "file" / "out", "a file has this name")
    refuse_target(tmp_path, tmp_path / "taken", "in the way")
    refuse_target(tmp_path, tmp_path / "loop", "")
    refuse_target(tmp_path, tmp_path / "a\0b", "not a path")
    refuse_target(tmp_path, tmp_path / ("n" * 250), "name is too long")
    refuse_target(tmp_path, Path("/"), "not empty")


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "read-only"), (errno.EACCES, "no permission")])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_target_that_cannot_be_written(
    call: str, number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_folder(tmp_path / "source")

    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StorageError, match=words) as caught:
            prepare_target(tmp_path / "out", source)
    assert str(tmp_path / "out.partial") in str(caught.value)


def test_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source_folder(tmp_path / "source")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(write.os.path, "ismount", lambda path: path == tmp_path / "disk")
    refuse_target(tmp_path, tmp_path / "disk", "top folder of a disk")


def test_publish_overwrites_nothing(tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source")
    partial = prepare_target(tmp_path / "out", source)
    (partial / "x").write_text("1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("1")
    with pytest.raises(ConvertError, match=r"thesis\.txt"):
        publish(partial, tmp_path / "out")
    assert names(tmp_path / "out") == ["thesis.txt"] and names(partial) == ["x"]
    (tmp_path / "file").write_text("1")
    with pytest.raises(ConvertError, match="a file"):
        publish(partial, tmp_path / "file")
    with pytest.raises(ConvertError, match="no such folder"):
        publish(tmp_path / "gone.partial", tmp_path / "new")
    assert names(tmp_path) == ["file", "out", "out.partial", "source"]

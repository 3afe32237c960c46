"""Ways to break a model folder. Each takes a fresh copy of a good one and damages it in one place."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Breaker = Callable[[Path], None]
BREAKERS: dict[str, Breaker] = {}


def breaker(function: Breaker) -> Breaker:
    BREAKERS[function.__name__] = function
    return function


# --- helpers --------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is KeyError:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def weights(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def with_tensor(folder: Path, suffix: str) -> tuple[Path, str]:
    for path in sorted(folder.glob("*.safetensors")):
        for name in read_header(path)[0]:
            if name.endswith(suffix):
                return path, name
    raise LookupError(suffix)


def edit_entry(folder: Path, suffix: str, **changes: Any) -> None:
    path, name = with_tensor(folder, suffix)
    header, body = read_header(path)
    header[name].update(changes)
    write_header(path, header, body)


def edit_bytes(folder: Path, suffix: str, new: Callable[[bytes], bytes]) -> None:
    path, name = with_tensor(folder, suffix)
    header, body = read_header(path)
    start, stop = header[name]["data_offsets"]
    changed = new(body[start:stop])
    assert len(changed) == stop - start
    write_header(path, header, body[:start] + changed + body[stop:])


def drop_tensor(folder: Path, suffix: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path, name = with_tensor(folder, suffix)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors or {"filler": torch.zeros(1)}, path)


def retype_tensor(folder: Path, suffix: str, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    path, name = with_tensor(folder, suffix)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)


# --- weight files ---------------------------------------------------------------------------------------------


@breaker
def truncated_weights(folder: Path) -> None:
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:-1000])


@breaker
def truncated_in_header(folder: Path) -> None:
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:300])


@breaker
def empty_weights(folder: Path) -> None:
    weights(folder).write_bytes(b"")


@breaker
def five_byte_weights(folder: Path) -> None:
    weights(folder).write_bytes(b"hello")


@breaker
def trailing_garbage(folder: Path) -> None:
    path = weights(folder)
    path.write_bytes(path.read_bytes() + b"x" * 64)


@breaker
def lfs_pointer(folder: Path) -> None:
    weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3107648\n")


@breaker
def huge_header_length(folder: Path) -> None:
    path = weights(folder)
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


@breaker
def header_not_json(folder: Path) -> None:
    _, body = read_header(weights(folder))
    write_header(weights(folder), b"{not json at all", body)


@breaker
def header_not_utf8(folder: Path) -> None:
    _, body = read_header(weights(folder))
    write_header(weights(folder), b"\xff\xfe\xfd\xfc" * 8, body)


@breaker
def header_is_a_list(folder: Path) -> None:
    _, body = read_header(weights(folder))
    write_header(weights(folder), [1, 2, 3], body)


@breaker
def header_deeply_nested(folder: Path) -> None:
    _, body = read_header(weights(folder))
    write_header(weights(folder), b"[" * 100_000, body)


@breaker
def overlapping_offsets(folder: Path) -> None:
    path = weights(folder)
    header, body = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    a, b = sorted(names, key=lambda name: header[name]["data_offsets"])[:2]
    size = header[b]["data_offsets"][1] - header[b]["data_offsets"][0]
    start = header[a]["data_offsets"][0]
    header[b]["data_offsets"] = [start, start + size]
    write_header(path, header, body)


@breaker
def offsets_outside(folder: Path) -> None:
    edit_entry(folder, "norm.weight", data_offsets=[10**12, 10**12 + 512])


@breaker
def negative_offsets(folder: Path) -> None:
    edit_entry(folder, "norm.weight", data_offsets=[-512, 0])


@breaker
def offsets_are_text(folder: Path) -> None:
    edit_entry(folder, "norm.weight", data_offsets=["a", "b"])


@breaker
def unknown_dtype(folder: Path) -> None:
    edit_entry(folder, "norm.weight", dtype="F12")


@breaker
def shape_contradicts_size(folder: Path) -> None:
    edit_entry(folder, "norm.weight", shape=[999])


@breaker
def negative_shape(folder: Path) -> None:
    edit_entry(folder, "norm.weight", shape=[-256])


@breaker
def shape_is_huge(folder: Path) -> None:
    edit_entry(folder, "norm.weight", shape=[2**62, 2**62])


@breaker
def entry_without_dtype(folder: Path) -> None:
    path, name = with_tensor(folder, "norm.weight")
    header, body = read_header(path)
    del header[name]["dtype"]
    write_header(path, header, body)


@breaker
def missing_norm(folder: Path) -> None:
    drop_tensor(folder, "input_layernorm.weight")


@breaker
def missing_embedding(folder: Path) -> None:
    drop_tensor(folder, "embed_tokens.weight")


@breaker
def norm_of_wrong_dtype(folder: Path) -> None:
    import torch

    retype_tensor(folder, "input_layernorm.weight", lambda t: t.to(torch.int32))


@breaker
def norm_of_wrong_shape(folder: Path) -> None:
    retype_tensor(folder, "input_layernorm.weight", lambda t: t[:-1])


@breaker
def norm_with_nan(folder: Path) -> None:
    retype_tensor(folder, "input_layernorm.weight", lambda t: t * float("nan"))


@breaker
def embedding_with_infinity(folder: Path) -> None:
    retype_tensor(folder, "embed_tokens.weight", lambda t: t.index_fill(0, t.new_tensor([5]).long(), float("inf")))


@breaker
def embedding_transposed(folder: Path) -> None:
    retype_tensor(folder, "embed_tokens.weight", lambda t: t.t())


@breaker
def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


@breaker
def only_pickles(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04malicious")


@breaker
def only_gguf(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


@breaker
def weights_are_a_directory(folder: Path) -> None:
    path = weights(folder)
    path.unlink()
    path.mkdir()


# --- config ---------------------------------------------------------------------------------------------------


@breaker
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@breaker
def config_empty(folder: Path) -> None:
    (folder / "config.json").write_text("")


@breaker
def config_truncated(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:120])


@breaker
def config_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(bytes(range(256)))


@breaker
def config_a_number(folder: Path) -> None:
    (folder / "config.json").write_text("42")


@breaker
def config_deeply_nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 50_000)


def config_breaker(name: str, **changes: Any) -> None:
    BREAKERS[name] = lambda folder: edit_json(folder / "config.json", **changes)


config_breaker("unknown_architecture", architectures=["MambaForCausalLM"], model_type="mamba")
config_breaker("architecture_missing", architectures=KeyError, model_type=KeyError)
config_breaker("architecture_of_wrong_type", architectures={"a": 1})
config_breaker("hidden_size_is_text", hidden_size="large")
config_breaker("hidden_size_negative", hidden_size=-256)
config_breaker("hidden_size_missing", hidden_size=KeyError)
config_breaker("hidden_size_of_another_model", hidden_size=512)
config_breaker("layers_zero", num_hidden_layers=0)
config_breaker("layers_absurd", num_hidden_layers=10**9)
config_breaker("more_layers_than_weights", num_hidden_layers=9)
config_breaker("heads_not_divisible", num_attention_heads=7)
config_breaker("kv_heads_zero", num_key_value_heads=0)
config_breaker("vocab_too_large", vocab_size=4096)
config_breaker("unknown_activation", hidden_act="swoosh")
config_breaker("unknown_rope", rope_scaling={"rope_type": "spiral", "factor": 2.0})
config_breaker("rope_factor_is_text", rope_scaling={"rope_type": "linear", "factor": "two"})
config_breaker("rope_scaling_is_a_list", rope_scaling=[1, 2])
config_breaker("rope_theta_zero", rope_theta=0)
config_breaker("epsilon_negative", rms_norm_eps=-1)
config_breaker("context_zero", max_position_embeddings=0)
config_breaker("unknown_quantization", quantization_config={"quant_method": "squeeze", "bits": 4})


# --- tokenizer and template -----------------------------------------------------------------------------------


@breaker
def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@breaker
def sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


@breaker
def tokenizer_truncated(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:5000])


@breaker
def tokenizer_of_wrong_structure(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Magic"}}')


@breaker
def tokenizer_config_broken(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")


@breaker
def tokenizer_larger_than_model(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 2048, "content": "<|beyond|>"})
    path.write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text("<|beyond|>{{ messages[0].content }}")


def template_breaker(name: str, text: str) -> None:
    BREAKERS[name] = lambda folder: (folder / "chat_template.jinja").write_text(text)


template_breaker("template_syntax_error", "{% for m in messages %}{{ m.content }")
template_breaker("template_endless", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
template_breaker("template_escapes", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
template_breaker("template_memory_bomb", "{{ ('x' * 100000) * 1000000 }}")
template_breaker("template_recursion", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")
template_breaker("template_refuses", "{{ raise_exception('only haiku, please') }}")
template_breaker("template_undefined", "{{ nothing.at.all }}")


@breaker
def generation_config_broken(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[" * 10)

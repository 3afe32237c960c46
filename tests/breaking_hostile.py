"""More ways to break a model folder: what an attacker or a bad disk would do. Importing it adds to BREAKERS."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from breaking import (
    BREAKERS,
    breaker,
    drop_tensor,
    edit_json,
    read_header,
    template_breaker,
    weights,
    with_tensor,
    write_header,
)

# --- special files, links, sizes ------------------------------------------------------------------------------


def special_breaker(name: str, file: str, make: Callable[[Path], None]) -> None:
    def damage(folder: Path) -> None:
        path = folder / file
        path.unlink(missing_ok=True)
        make(path)

    BREAKERS[name] = damage


# Opening a pipe waits for a writer that never comes, /dev/zero never ends, a loop of links leads nowhere.
special_breaker("weights_are_a_pipe", "more.safetensors", os.mkfifo)
special_breaker("weights_are_a_device", "more.safetensors", lambda path: path.symlink_to("/dev/zero"))
special_breaker("weights_link_to_themselves", "more.safetensors", lambda path: path.symlink_to(path.name))
special_breaker("config_is_a_pipe", "config.json", os.mkfifo)
special_breaker("tokenizer_is_a_pipe", "tokenizer.json", os.mkfifo)
special_breaker("tokenizer_is_a_device", "tokenizer.json", lambda path: path.symlink_to("/dev/zero"))
special_breaker("tokenizer_link_is_broken", "tokenizer.json", lambda path: path.symlink_to("blobs/absent"))
special_breaker("tokenizer_config_is_a_pipe", "tokenizer_config.json", os.mkfifo)
special_breaker("tokenizer_config_link_is_broken", "tokenizer_config.json", lambda path: path.symlink_to("absent"))
special_breaker("special_tokens_map_is_a_pipe", "special_tokens_map.json", os.mkfifo)
special_breaker("added_tokens_is_a_pipe", "added_tokens.json", os.mkfifo)
special_breaker("template_is_a_pipe", "chat_template.jinja", os.mkfifo)
special_breaker("template_is_a_device", "chat_template.jinja", lambda path: path.symlink_to("/dev/zero"))
special_breaker("template_is_a_folder", "chat_template.jinja", Path.mkdir)
special_breaker("template_link_is_broken", "chat_template.jinja", lambda path: path.symlink_to("blobs/absent"))
special_breaker("generation_config_links_to_itself", "generation_config.json", lambda p: p.symlink_to(p.name))


@breaker
def second_template_is_a_pipe(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "tool_use.jinja")


@breaker
def shard_missing(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


@breaker
def same_weights_twice(folder: Path) -> None:
    (folder / "copy.safetensors").write_bytes(weights(folder).read_bytes())


@breaker
def weights_with_escapes_in_the_name(folder: Path) -> None:
    (folder / "a\n\x1b[2J.safetensors").write_bytes(b"hello, hello")


@breaker
def tensor_twice_in_the_header(folder: Path) -> None:
    header, body = read_header(weights(folder))
    name = next(name for name in header if name != "__metadata__")
    write_header(weights(folder), f"{json.dumps(header)[:-1]}, {json.dumps({name: header[name]})[1:]}".encode(), body)


@breaker
def tensor_name_of_a_megabyte(folder: Path) -> None:
    path, name = with_tensor(folder, "embed_tokens.weight")
    header, body = read_header(path)
    header["\x1b[2J\n" * 200_000] = header.pop(name)
    write_header(path, header, body)


@breaker
def embedding_larger_than_memory(folder: Path) -> None:
    size = 2**42  # sparse: takes no room on the disk
    drop_tensor(folder, "embed_tokens.weight")
    edit_json(folder / "config.json", vocab_size=2**24)
    header = {"model.embed_tokens.weight": {"dtype": "F64", "shape": [2**31, 256], "data_offsets": [0, size]}}
    path = folder / "huge.safetensors"
    write_header(path, header, b"")
    os.truncate(path, path.stat().st_size + size)


# --- JSON that lies -------------------------------------------------------------------------------------------


def text_breaker(name: str, old: str, new: str) -> None:
    def damage(folder: Path) -> None:
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new, 1))

    BREAKERS[name] = damage


text_breaker("config_infinite_number", '"hidden_size": 256', '"hidden_size": 1e999')
text_breaker("config_number_of_401_digits", '"rope_theta": 10000.0', '"rope_theta": 1' + "0" * 400)
text_breaker("config_number_of_5001_digits", '"hidden_size": 256', '"hidden_size": 1' + "0" * 5000)
text_breaker("config_says_nan", '"rope_theta": 10000.0', '"rope_theta": NaN')
text_breaker("config_contradicts_itself", '"hidden_size": 256', '"hidden_size": 256, "hidden_size": 128')
text_breaker("config_with_escapes", '"LlamaForCausalLM"', '"\\u001b[31mX\\n\\u0000' + "y" * 100_000 + '"')


def json_breaker(name: str, file: str, data: bytes) -> None:
    BREAKERS[name] = lambda folder: (folder / file).write_bytes(data) and None


json_breaker("config_utf16", "config.json", "{}".encode("utf-16"))
json_breaker("tokenizer_is_a_pickle", "tokenizer.json", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.")
json_breaker("tokenizer_deeply_nested", "tokenizer.json", b"[" * 200_000)
json_breaker("tokenizer_config_deeply_nested", "tokenizer_config.json", b'{"a":' * 200_000)
json_breaker("tokenizer_config_utf16", "tokenizer_config.json", "{}".encode("utf-16"))
json_breaker("special_tokens_map_a_list", "special_tokens_map.json", b"[1, 2]")
json_breaker("generation_config_a_number", "generation_config.json", b"1" * 6000)
json_breaker("generation_config_eos_text", "generation_config.json", b'{"eos_token_id": ["</s>"]}')


# --- tokenizers that explode ----------------------------------------------------------------------------------


def tokenizer_breaker(name: str, **changes: Any) -> None:
    BREAKERS[name] = lambda folder: edit_json(folder / "tokenizer.json", **changes)


BLOW_UP = {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 1000}
tokenizer_breaker("normalizer_blows_up", normalizer={"type": "Sequence", "normalizers": [BLOW_UP] * 4})
tokenizer_breaker("decoder_blows_up", decoder={"type": "Sequence", "decoders": [BLOW_UP] * 4})
tokenizer_breaker("charsmap_cut_short", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAgAAA=="})
tokenizer_breaker("charsmap_not_base64", normalizer={"type": "Precompiled", "precompiled_charsmap": "?"})
tokenizer_breaker(
    "post_processor_of_unknown_token",
    post_processor={
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<nope>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
)
BREAKERS["tokenizer_flag_of_a_megabyte"] = lambda folder: edit_json(
    folder / "tokenizer_config.json", add_bos_token="a" * 2**20
)


# --- templates ------------------------------------------------------------------------------------------------

template_breaker("template_null_output", "{% if false %}x{% endif %}")
template_breaker("template_blank", "   \n\t ")
template_breaker("template_of_a_megabyte", "x" * 2**20)
template_breaker("template_nested_parentheses", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
template_breaker("template_pads", "{{ '%999999999d' % 1 }}{{ 'a'.center(999999999) }}")
template_breaker(
    "template_doubles",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
)
template_breaker("template_reads_files", "{% include '/etc/passwd' %}")
template_breaker("template_refuses_at_length", "{{ raise_exception('only haiku ' ~ 'z' * 1000000) }}")
template_breaker("template_refuses_in_many_lines", "{{ raise_exception('\\x1b[2J' ~ '\\n' * 5000 ~ 'boo') }}")
json_breaker("template_not_utf8", "chat_template.jinja", b"\xff\xfe{{ messages }}")

"""Every way to break a model folder ends in one short message on standard error and exit code 2."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import breaking_hostile  # adds its own to BREAKERS
import pytest
from breaking import BREAKERS, edit_bytes, edit_json, retype_tensor, with_tensor
from quantize import quantize_folder

from exl_runtime.cli.main import guarded, main

# What at least must be named in the message, where the name of the damaged file is not it.
NAMED = {
    "no_weights": "safetensors",
    "only_pickles": "pytorch_model.bin",
    "only_gguf": "gguf",
    "no_config": "config.json",
    "unknown_architecture": "MambaForCausalLM",
    "hidden_size_is_text": "hidden_size",
    "hidden_size_negative": "hidden_size",
    "heads_not_divisible": "num_attention_heads",
    "unknown_activation": "swoosh",
    "unknown_rope": "spiral",
    "epsilon_negative": "rms_norm_eps",
    "sentencepiece_only": "tokenizer.model",
    "template_refuses": "only haiku, please",
    "missing_norm": "input_layernorm",
    "norm_with_nan": "input_layernorm",
    "embedding_with_infinity": "embed_tokens",
    "more_layers_than_weights": "layers.6",
    "unknown_quantization": "squeeze",
    "lfs_pointer": "Git LFS",
    "tokenizer_is_a_pipe": "not a regular file",
    "template_link_is_broken": "does not exist",
    "normalizer_blows_up": "normalizer",
    "decoder_blows_up": "decoder",
    "post_processor_of_unknown_token": "<nope>",
    "template_refuses_at_length": "line 1",
}
assert breaking_hostile.BREAKERS is BREAKERS
AGES = 300.0  # seconds: no busy machine gets there, and what reads without end does


def expect_refusal(folder: Path, capsys: pytest.CaptureFixture[str], named: str = "") -> str:
    started = time.monotonic()
    code = guarded(main, ["run", str(folder), "-p", "hello", "-n", "4", "--backend", "reference"])
    out, err = capsys.readouterr()
    assert code == 2, f"exit code {code}; stdout {out!r}; stderr {err!r}"
    assert out == ""
    assert "Traceback" not in err and err.startswith("exl: "), err
    assert len(err) < 1200 and err.count("\n") <= 8, err
    assert named in err, err
    assert time.monotonic() - started < AGES, "it does not hang"
    return err


@pytest.mark.parametrize("name", BREAKERS)
def test_a_broken_folder_is_refused(name, demo, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    BREAKERS[name](folder)
    expect_refusal(folder, capsys, NAMED.get(name, ""))


def shifted(folder: Path, suffix: str) -> None:
    retype_tensor(folder, suffix, lambda t: t.roll(1, 0) + 1)


EXL2 = {
    "permutation_with_a_double": lambda f: retype_tensor(f, "q_invperm", lambda t: t.clone().fill_(3)),
    "permutation_out_of_range": lambda f: retype_tensor(f, "q_invperm", lambda t: t + 7),
    "permutation_of_floats": lambda f: retype_tensor(f, "q_invperm", lambda t: t.float()),
    "permutation_too_short": lambda f: retype_tensor(f, "q_invperm", lambda t: t[:-1]),
    "groups_odd": lambda f: retype_tensor(f, "q_groups", lambda t: t[:-1]),
    "groups_unknown_width": lambda f: retype_tensor(f, "q_groups", lambda t: t * 0 + 7),
    "groups_descending_offsets": lambda f: retype_tensor(f, "q_groups", lambda t: t.flip(0)),
    "scale_max_nan": lambda f: retype_tensor(f, "q_scale_max", lambda t: t * float("nan")),
    "scale_max_infinite": lambda f: edit_bytes(f, "q_scale_max", lambda b: b"\x00\x7c" + b[2:]),
    "scale_max_wrong_dtype": lambda f: retype_tensor(f, "q_scale_max", lambda t: t.float()),
    "scales_too_few": lambda f: retype_tensor(f, "q_scale", lambda t: t[:-1]),
    "weight_of_halves": lambda f: retype_tensor(f, "q_weight", lambda t: t.half()),
    "weight_columns_cut": lambda f: retype_tensor(f, "q_weight", lambda t: t[:, :-32]),
    "weight_rows_cut": lambda f: retype_tensor(f, "q_weight", lambda t: t[:-3]),
}


@pytest.mark.parametrize("name", EXL2)
def test_a_broken_exl2_matrix_is_refused(name, demo, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    EXL2[name](folder)
    expect_refusal(folder, capsys, " in output-00001-of-00002.safetensors")


GPTQ = {
    "g_idx_out_of_range": lambda f: retype_tensor(f, "g_idx", lambda t: t + 1000),
    "g_idx_too_short": lambda f: retype_tensor(f, "g_idx", lambda t: t[:-1]),
    "scales_nan": lambda f: retype_tensor(f, ".scales", lambda t: t * float("nan")),
    "scales_of_another_width": lambda f: retype_tensor(f, ".scales", lambda t: t[:, :-8]),
    "qzeros_of_another_width": lambda f: retype_tensor(f, "qzeros", lambda t: t[:, :-1]),
    "qweight_of_bytes": lambda f: retype_tensor(f, "qweight", lambda t: t.view(__import__("torch").uint8)),
    "qweight_cut": lambda f: retype_tensor(f, "qweight", lambda t: t[:-1]),
    "other_method": lambda f: edit_quantization(f, quant_method="awq"),
    "packed_for_marlin": lambda f: edit_quantization(f, checkpoint_format="marlin"),
    "bits_are_text": lambda f: edit_quantization(f, bits="four"),
}


def edit_quantization(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", quantization_config={**config["quantization_config"], **changes})


@pytest.fixture(scope="module")
def gptq_folder(ember, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "model"
    quantize_folder(ember, folder, "gptq", bits=4, group_size=128, act_order=True, symmetric=True, version=1)
    return folder


@pytest.mark.parametrize("name", GPTQ)
def test_a_broken_gptq_matrix_is_refused(name, gptq_folder, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gptq_folder, folder)
    GPTQ[name](folder)
    expect_refusal(folder, capsys)


def test_a_dense_folder_with_nan_is_refused(ember, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ember, folder)
    retype_tensor(folder, "layers.3.mlp.up_proj.weight", lambda t: t * float("nan"))
    expect_refusal(folder, capsys, "layers.3.mlp.up_proj")


def test_shards_that_were_swapped_are_refused(demo, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    expect_refusal(folder, capsys, second.name)


def test_a_model_that_computes_nan_says_so(ember, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ember, folder)
    retype_tensor(folder, "layers.2.mlp.down_proj.weight", lambda t: t.float() * 3e38)
    expect_refusal(folder, capsys, "layer 2")


def test_places_that_are_not_models(tmp_path, capsys) -> None:
    expect_refusal(tmp_path / "nowhere", capsys, "nowhere")
    expect_refusal(tmp_path, capsys, "config.json")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    expect_refusal(file, capsys, "gguf")


def test_the_helpers_find_their_tensors(demo) -> None:
    assert with_tensor(demo, "q_invperm")[1].endswith("q_invperm")


@pytest.mark.parametrize("where", ["~nobody-of-that-name/model", "a\0b", "m/" * 3000, "", "/dev/zero", "org/name-7B"])
def test_names_that_are_not_folders(where, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["run", where, "-p", "hi"], ["info", where], ["run", "demo", "-p", "hi", "--template", where]):
        assert guarded(main, arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("exl: ") and len(err) < 1200, (arguments, err)


def test_a_saved_chat_that_is_no_file(capsys, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("a\0b", "~nobody-of-that-name/x", str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        assert guarded(main, ["chat", "demo", "--backend", "reference", "--load", path]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "exl: " in err and "bug" not in err


def test_a_message_too_long_for_the_pipe_writes_nothing(capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 4000 + "\n"))
    assert guarded(main, ["chat", "demo", "-n", "4", "--backend", "reference"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--context" in err


def run_with(redirection: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    command = f'exec "$@" {redirection}'
    program = [sys.executable, "-m", "exl_runtime", *arguments]
    root = Path(__file__).resolve().parents[2]
    whole = ["sh", "-c", command, "sh", *program]
    return subprocess.run(whole, capture_output=True, timeout=AGES, cwd=root, check=False)


@pytest.mark.parametrize(
    "redirection",
    [
        ">&-",
        pytest.param(
            ">/dev/full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
        ),
    ],
)
def test_output_that_goes_nowhere_is_an_error(redirection) -> None:
    done = run_with(redirection, "info", "demo")
    err = done.stderr.decode()
    reason = os.strerror(errno.EBADF if "-" in redirection else errno.ENOSPC)
    assert done.returncode == 2 and err == f"exl: the output could not be written: {reason}\n"


def test_closed_input_and_closed_messages() -> None:
    empty = run_with("<&-", "run", "demo", "-p", "-")
    assert empty.returncode == 2 and b"the prompt is empty" in empty.stderr
    silent = run_with("2>&-", "run", "/nonexistent", "-p", "hi")
    assert silent.returncode == 2 and silent.stdout == silent.stderr == b""


def test_a_reader_that_leaves() -> None:
    done = run_with("| head -c1 >/dev/null", "info", "demo")
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr

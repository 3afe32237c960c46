"""Adapters against the same adapters merged into the weights, in float64 by transformers; and who gets which."""

import json
from pathlib import Path

import pytest
import torch
from adapters import Driven, check_rows_apart, linears_of, merged, write_adapter
from driving import batch_of, new_cache, open_model, run
from oracles import assert_as_good_as
from quantize import quantize_folder
from safetensors.torch import load_file, save_file
from tiny import by_name, logits_of, model_of, write

from exl_runtime.errors import AdapterError, ExlError
from exl_runtime.model.adapter_loading import load_adapter
from exl_runtime.model.lora import mix_key, mix_of

IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(60)]
OTHER = [(5 * i * i + i) % 120 + 4 for i in range(37)]
ORDERED = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": False, "version": 2}
FAMILIES = ("llama", "llama_bias", "qwen3", "gemma2", "phi3", "mixtral")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


def adapter(root: Path, family: str, seed: int, **options) -> Path:
    folder = root / f"{family}-{seed}"
    return write_adapter(folder, linears_of(model_of(by_name(family))), seed=seed, **options)


def exact(family: str, parts: list[tuple[Path, float]], ids: list[int], scales=None) -> torch.Tensor:
    with torch.inference_mode():
        model = merged(model_of(by_name(family)), parts, scales)
        return model(torch.tensor([ids]), use_cache=False).logits[0].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_equals_merged_weights(family, backend, root) -> None:
    model = open_model(write(by_name(family), root), backend)
    folders = [adapter(root, family, seed) for seed in (1, 2)]
    one, two = (load_adapter(folder, model) for folder in folders)
    plain = logits_of(model_of(by_name(family)), IDS)
    for parts, mix in (
        ([(folders[0], 1.0)], mix_of([(one, 1.0)])),
        ([(folders[0], 0.6), (folders[1], -0.7)], mix_of([(two, -0.7), (one, 0.6)])),
    ):
        oracle = exact(family, parts, IDS)
        naive = logits_of(merged(model_of(by_name(family)), parts).float(), IDS)
        ours = run(Driven(model, mix), IDS, [])
        assert_as_good_as(ours, naive, oracle, factor=4.0, floor=3e-6)
        assert (ours - plain).abs().max() > 0.05 * plain.abs().max()
    assert torch.equal(run(Driven(model, mix_of([(one, 0.0)])), IDS, []), run(Driven(model), IDS, []))


@pytest.mark.parametrize(("kind", "options"), [("exl2", {}), ("gptq", ORDERED)])
def test_an_adapter_on_a_quantized_model_follows_its_order_of_columns(kind, options, backend, root, tmp_path) -> None:
    """What comes out of gate and up has the order of the rows of `down`, where that is folded into them."""
    dense = quantize_folder(write(by_name("llama"), root), tmp_path / "q", kind, rounded=backend != "cpu", **options)
    model = open_model(tmp_path / "q", backend)
    assert (backend == "cpu") == any(block.mlp.inner_order is not None for block in model.blocks)
    path = adapter(root, "llama", 3)
    mix = mix_of([(load_adapter(path, model), 1.0)])
    reference = model_of(by_name("llama"))
    reference.load_state_dict({name: tensor.float() for name, tensor in dense.items()})
    with torch.inference_mode():
        plain = reference.double()(torch.tensor([IDS]), use_cache=False).logits[0]
        oracle = merged(reference, [(path, 1.0)])(torch.tensor([IDS]), use_cache=False).logits[0]
    # Packed kernels round their inputs, in the adapted model as much as in the plain one.
    bound = 4 * (run(model, IDS, []) - plain).abs().max()
    assert bound < 0.1 * (plain - oracle).abs().max()
    assert (run(Driven(model, mix), IDS, []) - oracle).abs().max() <= bound


def test_scales_follow_rslora_and_patterns(root, backend) -> None:
    model = open_model(write(by_name("llama"), root), backend)
    shapes = linears_of(model_of(by_name("llama")), ("q_proj", "down_proj"))
    odd = "model.layers.1.self_attn.q_proj"
    path = write_adapter(
        root / "patterns",
        shapes,
        ranks={odd: 3},
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={r"layers\.[02]\.mlp\.down_proj": 2.5},
        infix=".default",
    )
    scales = dict.fromkeys(shapes, 8 / 5**0.5) | {odd: 8 / 3**0.5}
    scales |= {f"model.layers.{layer}.mlp.down_proj": 2.5 / 5**0.5 for layer in (0, 2)}
    oracle = exact("llama", [(path, 1.0)], IDS, scales)
    ours = run(Driven(model, mix_of([(load_adapter(path, model), 1.0)])), IDS, [])
    assert (ours - oracle).abs().max() <= 1e-4 * oracle.abs().max()


def test_the_head_and_half_precision_adapters(root, backend) -> None:
    model = open_model(write(by_name("llama"), root), backend)
    shapes = linears_of(model_of(by_name("llama")), ("lm_head", "v_proj"))
    for dtype in (torch.float16, torch.bfloat16):
        path = write_adapter(root / f"head-{dtype}", shapes, dtype=dtype)
        oracle = exact("llama", [(path, 1.0)], IDS)
        mix = mix_of([(load_adapter(path, model), 1.0)])
        kv = new_cache(model)
        whole = Driven(model, mix).forward(batch_of([(IDS, 0, [2])]), kv)
        assert (whole - oracle).abs().max() <= 1e-4 * oracle.abs().max()
        last = Driven(model, mix).forward(batch_of([(IDS, 0, [2])], all_logits=False), kv)
        assert (last[0] - whole[-1]).abs().max() <= (0.0 if backend == "cpu" else 1e-4 * whole.abs().max().item())


def test_rows_of_one_pass_have_their_own_adapters(root, backend) -> None:
    model = open_model(write(by_name("llama"), root), backend)
    one, two = (load_adapter(adapter(root, "llama", seed), model) for seed in (1, 2))
    check_rows_apart(model, (one, two), (IDS, OTHER), exact=backend == "cpu")


def test_the_same_bits_on_any_number_of_threads(root) -> None:
    from exl_runtime.ops import native

    if why := native.available():
        pytest.skip(why)
    model = open_model(write(by_name("llama"), root), "cpu")
    mix = mix_of([(load_adapter(adapter(root, "llama", 1), model), 1.0)])
    found = []
    for threads in (1, 2, 3):
        native.set_threads(threads)
        found.append(run(Driven(model, mix), IDS, []))
    native.set_threads(None)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_keys_name_adapters_and_weights(root) -> None:
    model = open_model(write(by_name("llama"), root), "reference")
    one, two = (load_adapter(adapter(root, "llama", seed), model) for seed in (1, 2))
    again = load_adapter(adapter(root, "llama", 1), model)
    mixes = ([], [(one, 1.0)], [(one, 0.5)], [(two, 1.0)], [(one, 1.0), (two, 1.0)], [(one, 0.5), (two, 1.0)])
    keys = [mix_key(b"root", mix_of(mix)) for mix in mixes]
    assert len(set(keys)) == len(keys) and keys[0] == b"root"
    assert mix_key(b"root", mix_of([(again, 1.0)])) == keys[1]
    assert mix_key(b"root", mix_of([(two, 1.0), (one, 1.0)])) == keys[4]


PEFT = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"use_dora": True}, "no lora_magnitude_vector beside"),
        ({"lora_bias": True}, "no lora_B.bias beside"),
        ({"target_parameters": "experts"}, "target_parameters"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"alora_invocation_tokens": [5]}, "activated"),
        ({"arrow_config": {"top_k": 2}}, "routes"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 4}}, "MonteCLoRA"),
        ({"velora_config": {"rank": 4}}, "VeLoRA"),
        ({"layer_replication": [[0, 2]]}, "repeats"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 7}, "rank 7"),
        ({"r": "many"}, '"r"'),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"rank_pattern": {"(": 2}}, "regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"use_rslora": 1}, "use_rslora"),
    ],
)
def test_unknown_kinds_are_refused_by_name(change, says, root, tmp_path) -> None:
    model = open_model(write(by_name("llama"), root), "reference")
    path = write_adapter(tmp_path / "a", {Q0: (64, 64)})
    config = json.loads((path / "adapter_config.json").read_text())
    load_adapter(path, model)
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ExlError, match=says):
        load_adapter(path, model)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: {f"{k}.": v for k, v in t.items()}, "lora_A.weight"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "no lora_B"),
        (lambda t: {k.replace("q_proj", "z_proj"): v for k, v in t.items()}, "no matrix of this model"),
        (lambda t: {k.replace("layers.0", "layers.9"): v for k, v in t.items()}, "no matrix of this model"),
        (
            lambda t: {k.replace("self_attn.q", "mlp.experts.0.gate"): v for k, v in t.items()},
            "no matrix of this model",
        ),
        (lambda t: {k.replace("self_attn.q_proj", "mlp.experts"): v for k, v in t.items()}, "no matrix of this model"),
        (lambda t: {k.replace("lora_A.weight", "lora_embedding_A"): v for k, v in t.items()}, "no lora_embedding_B"),
        (lambda t: {**t, f"{PEFT}{Q0}.lora_magnitude_vector": torch.ones(64)}, "knows nothing of a lora_magnitude"),
        (lambda t: {**t, f"{PEFT}{Q0}.lora_B.bias": torch.ones(64)}, "knows nothing of a lora_B.bias"),
        (lambda t: {**t, f"{PEFT}model.norm.weight": torch.ones(64)}, "is a norm"),
        (lambda t: {**t, f"{PEFT}model.layers.0.input_layernorm.weight": torch.ones(64)}, "is a norm"),
        (lambda t: {**t, f"{PEFT}lm_head.weight": torch.ones(140, 64)}, "140 outputs"),
        (lambda t: {**t, f"{PEFT}lm_head.base_layer.weight": torch.ones(140, 64)}, "140 outputs"),
        (lambda t: {**t, f"{PEFT}model.embed_tokens.weight": torch.ones(140, 64)}, "vocabulary"),
        (lambda t: {**t, f"{PEFT}model.embed_tokens.base_layer.weight": torch.ones(140, 64)}, "vocabulary"),
        (lambda t: {**t, f"{PEFT}{Q0}.base_layer.bias": torch.ones(63)}, "63 outputs"),
        (lambda t: {**t, f"{PEFT}{Q0}.base_layer.bias": torch.full((64,), float("inf"))}, "is inf"),
        (lambda t: {**t, f"{PEFT}lm_head.token_adapter.trainable_tokens_delta": torch.ones(1, 64)}, "token_indices"),
        (lambda t: {**t, f"{PEFT}{Q0}.weight": torch.ones(64)}, r"shape \(64,\), wanted 2 dimensions"),
        (lambda t: {**t, f"{PEFT}{Q0}.weight": torch.ones(())}, r"shape \(\), wanted 2 dimensions"),
        (lambda t: {**t, f"{PEFT}{Q0}.bias": torch.ones(64, 1)}, r"shape \(64, 1\), wanted 1 dimension,"),
        (lambda t: {**t, f"{PEFT}lm_head.base_layer.weight": torch.ones(64)}, "wanted 2 dimensions"),
        (lambda t: {**t, f"{PEFT}lm_head.token_adapter.trainable_tokens_delta": torch.ones(0, 64)}, "none empty"),
        (lambda t: {**t, f"{PEFT}model.embed_tokens.bias": torch.ones(64)}, "no matrix of this model"),
        (lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}, "63 inputs"),
        (lambda t: {k: v[:-1] if "lora_B" in k else v for k, v in t.items()}, "63 outputs"),
        (lambda t: {k: v[:, :-1] if "lora_B" in k else v for k, v in t.items()}, "wanted"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "is nan"),
        (lambda t: {k: v.to(torch.int32) for k, v in t.items()}, "not a number format"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(edit, says, root, tmp_path) -> None:
    model = open_model(write(by_name("llama"), root), "reference")
    path = write_adapter(tmp_path / "a", {Q0: (64, 64)})
    tensors = {k: v.contiguous() for k, v in edit(load_file(path / "adapter_model.safetensors")).items()}
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ExlError, match=says):
        load_adapter(path, model)


def test_missing_files_and_pickles(root, tmp_path) -> None:
    model = open_model(write(by_name("llama"), root), "reference")
    path = write_adapter(tmp_path / "a", {Q0: (64, 64)})
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(path, model)
    for other, says in ((path / "adapter_model.bin", "is a file"), (tmp_path / "none", "no folder"), (root, "no ad")):
        with pytest.raises(AdapterError, match=says):
            load_adapter(other, model)
    (path / "adapter_model.bin").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="adapter_config"):
        load_adapter(path, model)


TABLE = f"{PEFT}model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("ids", "rows", "says"),
    [
        ([3, 9], torch.ones(3, 64), "lists 2 tokens"),
        ([3, 3], torch.ones(2, 64), "twice"),
        ([3, 131], torch.ones(2, 64), "up to 131"),
        ([3, 9], torch.ones(2, 60), r"\(2, 60\)"),
        ({"lm_head": [3, 9]}, torch.ones(2, 64), "token_indices"),
        ([3, True], torch.ones(2, 64), "token_indices"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(ids, rows, says, root, tmp_path) -> None:
    model = open_model(write(by_name("llama"), root), "reference")
    path = write_adapter(tmp_path / "a", {Q0: (64, 64)}, trainable_token_indices=ids)
    weights = path / "adapter_model.safetensors"
    save_file({**load_file(weights), TABLE: rows}, weights)
    with pytest.raises(AdapterError, match=says):
        load_adapter(path, model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v[:-1] if "lora_A" in k else v for k, v in t.items()}, "no stack of this model's experts"),
        (lambda t: {k: v[:, :-1] if "lora_A" in k else v for k, v in t.items()}, "no stack of this model's experts"),
        (lambda t: {k: v[:-1] if "lora_B" in k else v for k, v in t.items()}, "no stack of this model's experts"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(change, says, root, tmp_path) -> None:
    model = open_model(write(by_name("mixtral"), root), "reference")
    module = "model.layers.0.mlp.experts"
    path = write_adapter(
        tmp_path / "a", {module: (96, 64)}, ranks={module: 20}, target_parameters=["experts.down_proj"]
    )
    load_adapter(path, model)
    weights = path / "adapter_model.safetensors"
    tensors = change(load_file(weights))
    if tensors[f"{PEFT}{module}.lora_A.weight"].shape[0] == 19:
        tensors[f"{PEFT}{module}.lora_B.weight"] = tensors[f"{PEFT}{module}.lora_B.weight"][:, :-1].contiguous()
    save_file({k: v.contiguous() for k, v in tensors.items()}, weights)
    with pytest.raises(AdapterError, match=says):
        load_adapter(path, model)


def test_settings_nobody_knows_are_named_once(root, tmp_path, caplog) -> None:
    model = open_model(write(by_name("llama"), root), "reference")
    path = write_adapter(tmp_path / "a", {Q0: (64, 64)}, use_wonder=True, other=None, target_modules=["q_proj"])
    load_adapter(path, model)
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["use_wonder"]

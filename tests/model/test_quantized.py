"""EXL2 and GPTQ models against transformers running on the dequantized weights."""

from functools import cache
from pathlib import Path

import pytest
import torch
from driving import open_model, run
from oracles import assert_as_good_as, assert_inputs_rounded
from quantize import join_fused, quantize_folder
from tiny import by_name, logits_of, model_of, write

IDS = [(11 * i * i + 5 * i + 2) % 128 + 3 for i in range(70)]
GPTQ = {
    "b4_g32_act_v1": {"bits": 4, "group_size": 32, "act_order": True, "symmetric": True, "version": 1},
    "b3_g64_v2_asym": {"bits": 3, "group_size": 64, "act_order": False, "symmetric": False, "version": 2},
    "b8_all_v1_asym": {"bits": 8, "group_size": -1, "act_order": False, "symmetric": False, "version": 1},
    "b2_g32_act_v2": {"bits": 2, "group_size": 32, "act_order": True, "symmetric": False, "version": 2},
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("quantized")


def check(family, folder: Path, dense, backend: str) -> None:
    """The reference against float32 transformers. Packed kernels round their inputs instead, at seven products a layer
    and the head; and not the product of code and scale to half, see `quantized`."""
    reference = model_of(family)
    state = reference.state_dict()
    joined = join_fused({name: tensor.float() for name, tensor in dense.items()}, state)
    if "lm_head.weight" in dense and reference.config.tie_word_embeddings:
        # A tied model with a quantized head of its own: embedding and head differ from now on.
        reference.lm_head.weight = torch.nn.Parameter(torch.zeros_like(reference.lm_head.weight))
        joined["lm_head.weight"] = dense["lm_head.weight"].float()
    missing, unexpected = reference.load_state_dict(joined, strict=False)
    assert not unexpected and not [name for name in missing if name != "lm_head.weight"]
    ids = without_ties(reference, IDS)
    naive = logits_of(reference, ids)
    with torch.inference_mode():
        oracle = reference.double()(torch.tensor([ids]), use_cache=False).logits[0]
    ours = run(open_model(folder, backend), ids, [33])
    if backend == "cpu":
        assert_inputs_rounded(ours, oracle, 7 * reference.config.num_hidden_layers + 1)
    else:
        assert_as_good_as(ours, naive, oracle, factor=4.0, floor=3e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mistral"])
def test_exl2(name, backend, root) -> None:
    check(by_name(name), *quantized(root, name, "exl2", backend), backend)


@pytest.mark.parametrize("options", GPTQ.values(), ids=GPTQ)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_gptq(name, options, backend, root) -> None:
    check(by_name(name), *quantized(root, name, "gptq", backend, tuple(options.items())), backend)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_exl2_experts(name, backend, root) -> None:
    folder, dense = quantized(root, name, "exl2", backend)
    stacked = stack_experts(dense, model_of(by_name(name)).state_dict())
    check(by_name(name), folder, stacked, backend)


def without_ties(reference, ids: list[int]) -> list[int]:
    """The ids, but for a token at which two experts are so close that the rounding of inputs may choose the other one.

    That is 6 * 2 * sqrt(22) * 2.3e-5 (`assert_inputs_rounded`) of router logits of about 1. One token of qwen3_moe.
    """

    def gaps(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            routers = reference(torch.tensor([ids]), use_cache=False, output_router_logits=True).router_logits
        chosen = reference.config.num_experts_per_tok
        best = torch.stack([logits.topk(chosen + 1).values for logits in routers])
        return (best[..., chosen - 1] - best[..., chosen]).amin(0)

    if not hasattr(reference.config, "num_experts_per_tok"):
        return ids
    steady = [token for token, gap in zip(ids, gaps(ids), strict=True) if gap > 1.5e-3]
    assert len(steady) >= len(ids) - 1 and gaps(steady).min() > 1.5e-3
    return steady


@cache
def quantized(root: Path, name: str, kind: str, backend: str, options: tuple[tuple[str, object], ...] = ()):
    """The folder and its weights, as the backend reads them."""
    target = root / "-".join(map(str, (name, kind, backend, *(value for _, value in options))))
    source = write(by_name(name), root)
    return target, quantize_folder(source, target, kind, rounded=backend != "cpu", **dict(options))


def stack_experts(dense, state):
    """Single experts as they are stored -> the stacked parameters of the transformers module."""
    out = {name: tensor for name, tensor in dense.items() if ".experts." not in name}
    letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, like in state.items():
        if ".experts." not in name:
            continue
        stem, part = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)

        def single(e: int, p: str, stem: str = stem) -> torch.Tensor:
            for path in (f"{stem}.{e}.{p}", f"{stem}.{e}.{letters[p]}".replace("mlp.", "block_sparse_moe.")):
                if f"{path}.weight" in dense:
                    return dense[f"{path}.weight"]
            raise KeyError(f"{stem}.{e}.{p}")

        out[name] = torch.stack([torch.cat([single(e, p) for p in parts]) for e in range(like.shape[0])])
    for name in list(out):
        if "block_sparse_moe.gate" in name:
            out[name.replace("block_sparse_moe", "mlp")] = out.pop(name)
    return out

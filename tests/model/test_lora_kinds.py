"""Every kind of adapter that peft writes, against parameters changed by hand in float64; alone, weighted, mixed."""

from pathlib import Path

import pytest
import torch
from adapter_cases import CASES, changed, made
from adapters import Driven, check_rows_apart, linears_of, write_adapter
from driving import batch_of, new_cache, open_model, run
from oracles import assert_as_good_as
from quantize import quantize_folder
from tiny import by_name, logits_of, model_of, write

from exl_runtime.model.adapter_loading import load_adapter
from exl_runtime.model.dora import table_norms, weight_norms
from exl_runtime.model.lora import mix_of

ORDERED = {"bits": 4, "group_size": 32, "act_order": True, "symmetric": False, "version": 2}
QUANTIZED = [("exl2", {}), ("gptq", ORDERED)]
IDS = [(7 * i * i + 3 * i + 11) % 128 + 3 for i in range(60)]
OTHER = [(5 * i * i + i) % 120 + 4 for i in range(37)]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


def exact(family: str, parts) -> torch.Tensor:
    with torch.inference_mode():
        return changed(model_of(by_name(family)), parts)(torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_a_kind_equals_changed_parameters(name, backend, root, tmp_path) -> None:
    family = CASES[name][0]
    model = open_model(write(by_name(family), root), backend)
    first, second = (made(name, model_of(by_name(family)), seed) for seed in (5, 6))
    one, two = (load_adapter(m.write(tmp_path / str(i)), model) for i, m in enumerate((first, second)))
    plain = logits_of(model_of(by_name(family)), IDS)
    for parts, mix in (
        ([(first, 1.0)], mix_of([(one, 1.0)])),
        ([(first, 0.6), (second, -0.4)], mix_of([(one, 0.6), (two, -0.4)])),
    ):
        oracle = exact(family, parts)
        naive = logits_of(changed(model_of(by_name(family)), parts).float(), IDS)
        ours = run(Driven(model, mix), IDS, [])
        assert_as_good_as(ours, naive, oracle, factor=4.0, floor=3e-6)
        assert (ours - plain).abs().max() > 0.05 * plain.abs().max()


@pytest.mark.parametrize("name", ["dora", "whole modules", "single tokens", "an embedding and the head", "all biases"])
def test_rows_of_one_pass_have_their_own(name, backend, root, tmp_path) -> None:
    check_rows(name, backend, root, tmp_path)


@pytest.mark.parametrize("name", ["stacked experts and routers", "experts one by one"])
def test_rows_of_one_pass_have_their_own_experts(name, backend, root, tmp_path) -> None:
    check_rows(name, backend, root, tmp_path)


def test_a_plain_adapter_beside_others_keeps_its_bits(root, tmp_path) -> None:
    """Alone it runs inside the native pass; beside what that does not know, operator by operator."""
    from exl_runtime.ops import native

    if why := native.available():
        pytest.skip(why)
    model = open_model(write(by_name("llama"), root), "cpu")
    shapes = linears_of(model_of(by_name("llama")), ("q_proj", "down_proj", "lm_head"))
    plain = load_adapter(write_adapter(tmp_path / "plain", shapes), model)
    cases = ("dora", "whole modules", "single tokens")
    others = [load_adapter(made(n, model_of(by_name("llama"))).write(tmp_path / n), model) for n in cases]
    one = mix_of([(plain, 0.7)])
    alone = [run(Driven(model, one), IDS, []), run(model, OTHER, [])]
    for other in others:
        sequences = [(IDS, 0, [4]), (OTHER, 0, [1]), (IDS, 0, [0])]
        driven = Driven(model, mixes=(one, (), mix_of([(other, 1.0), (plain, 0.7)])))
        found = driven.forward(batch_of(sequences), new_cache(model))
        assert torch.equal(found[: len(IDS)], alone[0])
        assert torch.equal(found[len(IDS) : len(IDS) + len(OTHER)], alone[1])


def check_rows(name: str, backend: str, root: Path, folder: Path) -> None:
    family = CASES[name][0]
    model = open_model(write(by_name(family), root), backend)
    one, two = (
        load_adapter(made(name, model_of(by_name(family)), seed).write(folder / str(seed)), model) for seed in (1, 2)
    )
    check_rows_apart(model, (one, two), (IDS, OTHER), exact=backend == "cpu")


def quantized(root: Path, folder: Path, kind: str, backend: str, options: dict):
    """A quantized model, and a transformers model with the weights it stands for."""
    dense = quantize_folder(write(by_name("llama"), root), folder, kind, rounded=backend != "cpu", **options)
    reference = model_of(by_name("llama"))
    reference.load_state_dict({name: tensor.float() for name, tensor in dense.items()})
    return open_model(folder, backend), reference


@pytest.mark.parametrize(("kind", "options"), QUANTIZED)
def test_norms_of_packed_matrices_are_those_of_their_weights(kind, options, backend, root, tmp_path) -> None:
    """A float32 rounding of each weight that a unit vector brings out, and two of the scale of its activations."""
    model, reference = quantized(root, tmp_path / "q", kind, backend, options)
    generator = torch.Generator().manual_seed(1)
    for block, layer in zip(model.blocks, reference.model.layers, strict=True):
        for linear, module in ((block.attention.out, layer.self_attn.o_proj), (block.mlp.down, layer.mlp.down_proj)):
            kernel, weight = linear.kernel, module.weight.detach().double()
            if kernel.input_order is not None:
                weight = weight[:, kernel.input_order.long()]
            down = torch.randn(3, kernel.shape.in_features, generator=generator)
            up = torch.randn(kernel.shape.out_features, 3, generator=generator) * 0.1
            found = weight_norms(kernel, down, up, 0.7)
            oracle = (weight + 0.7 * up.double() @ down.double()).norm(dim=1)
            assert ((found - oracle).abs() <= 1e-6 * oracle).all()
    table = reference.model.embed_tokens.weight.detach()
    down, up = torch.randn(2, len(table), generator=generator), torch.randn(table.shape[1], 2, generator=generator)
    oracle = (table.double() + 0.5 * (up.double() @ down.double()).t()).norm(dim=0)
    assert ((table_norms(table, down, up, 0.5) - oracle).abs() <= 1e-12 * oracle).all()


@pytest.mark.parametrize("name", ["dora", "whole modules"])
@pytest.mark.parametrize(("kind", "options"), QUANTIZED)
def test_a_kind_on_a_quantized_model(name, kind, options, backend, root, tmp_path) -> None:
    """In the order of columns of each matrix; what comes out of gate and up has that of the rows of `down`."""
    model, reference = quantized(root, tmp_path / "q", kind, backend, options)
    case = made(name, reference)
    mix = mix_of([(load_adapter(case.write(tmp_path / "a"), model), 1.0)])
    with torch.inference_mode():
        plain = reference.double()(torch.tensor([IDS]), use_cache=False).logits[0]
        oracle = changed(reference, [(case, 1.0)])(torch.tensor([IDS]), use_cache=False).logits[0]
    # Packed kernels round their inputs, in the adapted model as much as in the plain one.
    bound = 4 * (run(model, IDS, []) - plain).abs().max()
    assert bound < 0.1 * (plain - oracle).abs().max()
    assert (run(Driven(model, mix), IDS, []) - oracle).abs().max() <= bound

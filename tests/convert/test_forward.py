"""The batched forward pass against transformers: logits, what enters the matrices, gradients."""

from pathlib import Path

import pytest
import torch
from oracles import assert_as_good_as
from tiny import FAMILIES, by_name, logits_of, model_of, write

from convert.forward import Model, embed
from convert.source import Source

ROWS = [[(7 * i * i + 3 * i + shift) % 128 + 3 for i in range(90)] for shift in (11, 40)]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forward")


def load(name: str, root: Path, length: int = 90) -> Model:
    with Source.open(write(by_name(name), root)) as source:
        return Model.load(source, length)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_equal_transformers(family, root: Path) -> None:
    with torch.no_grad():
        ours = load(family.name, root)(torch.tensor(ROWS))
    reference = model_of(family)
    naive = torch.stack([logits_of(reference, row) for row in ROWS])
    with torch.no_grad():
        oracle = reference.double()(torch.tensor(ROWS), use_cache=False).logits.double()
    assert_as_good_as(ours, naive, oracle, factor=4.0, floor=3e-6)
    assert (ours - naive).abs().max() <= 2e-5 * naive.abs().max()


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "qwen3", "phi3"])
def test_the_inputs_of_the_matrices_are_those_of_transformers(name: str, root: Path) -> None:
    reference = model_of(by_name(name))
    block, seen = reference.model.layers[1], {}

    def spy(key: str):
        return lambda module, given, out: seen.update({key: given[0]})

    first = getattr(block.self_attn, "q_proj", None) or block.self_attn.qkv_proj
    up = getattr(block.mlp, "up_proj", None) or block.mlp.gate_up_proj
    for key, module in (("h", first), ("inner", block.self_attn.o_proj), ("m", up), ("mlp_inner", block.mlp.down_proj)):
        module.register_forward_hook(spy(key))
    with torch.no_grad():
        reference(torch.tensor(ROWS), use_cache=False)
        model = load(name, root)
        layer, w = model.layers[1], model.weights[1]
        x = model.layers[0](embed(model.spec, model.embedding, torch.tensor(ROWS)), model.weights[0])
        h = layer.attention_input(x, w)
        inner = layer.attention_inner(h, w)
        x = layer.attention_add(x, inner, w)
        m = layer.mlp_input(x, w)
        mlp_inner = layer.mlp_inner(m, w)
    for key, ours in (("h", h), ("inner", inner), ("m", m), ("mlp_inner", mlp_inner)):
        assert (ours - seen[key]).abs().max() <= 2e-5 * seen[key].abs().max(), key


@pytest.mark.parametrize("name", ["gemma2", "llama_bias"])
def test_the_steps_of_a_dense_layer_make_the_whole(name: str, root: Path) -> None:
    model = load(name, root)
    layer, w = model.layers[0], model.weights[0]
    x = embed(model.spec, model.embedding, torch.tensor(ROWS))
    assert not layer.is_moe
    y = layer.attention_add(x, layer.attention_inner(layer.attention_input(x, w), w), w)
    y = layer.mlp_add(y, layer.mlp_inner(layer.mlp_input(y, w), w), w)
    assert torch.equal(y, layer(x, w))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_steps_of_a_layer_with_experts_make_the_whole(name: str, root: Path) -> None:
    model = load(name, root)
    layer, w = model.layers[2], model.weights[2]
    x = embed(model.spec, model.embedding, torch.tensor(ROWS))
    assert layer.is_moe
    y = layer.attention_add(x, layer.attention_inner(layer.attention_input(x, w), w), w)
    h = layer.mlp_input(y, w)
    weights, experts, scores = layer.route(h, w)
    flat = h.flatten(0, 1)
    assert weights.shape == experts.shape == (180, 2)
    torch.testing.assert_close(scores, flat @ w["router"])
    # Every expert over every row, most of them at weight zero: another way to say the same sum.
    share = torch.zeros_like(scores).scatter(1, experts, weights)
    out = sum(
        share[:, e, None] * (layer.expert_inner(flat, w, e) @ w[f"experts.{e}.down_proj"])
        for e in range(scores.shape[1])
    )
    torch.testing.assert_close(layer.moe_output(h, w), out.view_as(h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.moe_add(y, out.view_as(h), w), layer(x, w), rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_transformers(root: Path) -> None:
    """Windows, softcaps, tied table, norms around zero, four norms a layer."""
    reference = model_of(by_name("gemma2"))
    ids = torch.tensor(ROWS)[:, :40]
    torch.manual_seed(1)
    pull = torch.randn(2, 40, 131)
    (reference(ids, use_cache=False).logits * pull).sum().backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    with Source.open(write(by_name("gemma2"), root)) as source:
        model = Model.load(source, 40)
        names = [
            {slot.key: f"{slot.path}.weight" for slot in source.slots(i)}
            | {key: name for name, key in source.dense_tensors(i).items()}
            for i in range(3)
        ]
    for w in model.weights:
        assert w.keys() == names[0].keys()
        for tensor in w.values():
            tensor.requires_grad_()
    for tensor in (model.embedding, model.final_norm, model.head):
        tensor.requires_grad_()
    (model(ids) * pull).sum().backward()

    def compare(ours: torch.Tensor, wanted: torch.Tensor) -> None:
        assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()

    for w, named in zip(model.weights, names, strict=True):
        for key, tensor in w.items():
            compare(tensor.grad.t() if tensor.dim() == 2 else tensor.grad, theirs[named[key]])
    compare(model.final_norm.grad, theirs["model.norm.weight"])
    compare(model.embedding.grad + model.head.grad.t(), theirs["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["mixtral", "llama_bias"])
def test_gradients_are_slopes(name: str, root: Path) -> None:
    """One layer: the derivative along a random direction, for x and for every tensor, against a difference."""
    model = load(name, root, length=20)
    layer, w = model.layers[1], dict(model.weights[1])
    torch.manual_seed(2)
    x = embed(model.spec, model.embedding, torch.tensor(ROWS)[:, :20])
    pull = torch.randn_like(x).double()
    places = {"x": x, **w}
    for tensor in places.values():
        tensor.requires_grad_()

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return (layer(given["x"], given).double() * pull).sum()

    loss(places).backward()
    for key, tensor in places.items():
        along = tensor.grad * (0.01 * tensor.detach().norm() / tensor.grad.norm())
        with torch.no_grad():
            up, down = (loss({**places, key: tensor + sign * 0.2 * along}) for sign in (1, -1))
        slope = (tensor.grad.double() * along).sum()
        assert abs((up - down) / 0.4 - slope) <= 0.02 * slope, key


def test_matrices_may_be_narrow(root: Path) -> None:
    """bfloat16 matrices on a float32 stream, experts and head norms included: close, and float32 at the end."""
    for name in ("qwen3_moe", "gemma2"):
        model = load(name, root)
        x = embed(model.spec, model.embedding, torch.tensor(ROWS))
        exact = model.layers[0](x, model.weights[0])
        w = {key: t if key.endswith("norm") else t.bfloat16() for key, t in model.weights[0].items()}
        near = model.layers[0](x, w)
        assert near.dtype == torch.float32
        assert 0 < (near - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_the_planned_length_selects_the_frequencies(name: str, root: Path) -> None:
    ids = torch.tensor(ROWS)
    long, short = load(name, root, 90), load(name, root, 30)
    start = long(ids[:, :30])
    torch.testing.assert_close(start, long(ids)[:, :30], rtol=1e-4, atol=1e-4)
    assert (short(ids[:, :30]) - start).abs().max() > 1e-2
    reference = model_of(by_name(name))
    torch.testing.assert_close(short(ids[:, :30])[0], logits_of(reference, ROWS[0][:30]), rtol=1e-4, atol=1e-4)


def test_rows_longer_than_planned_are_refused(root: Path) -> None:
    model = load("llama", root, length=8)
    with pytest.raises(ValueError, match="9 tokens in a pass planned for 8"):
        model(torch.tensor(ROWS)[:, :9])

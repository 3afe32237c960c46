"""Expert routing: the model's own rule, and a choice that never depends on sorting."""

import pytest
import torch

from exl_runtime.ops.moe import route


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).log_softmax(-1) + 5.0
    shares = torch.tensor([0.0, 2.0, 1.0, -1.0]).softmax(-1)
    weights, experts = route(logits, 2, normalize=False)
    assert experts.tolist() == [[1, 2]]
    assert torch.allclose(weights, shares[[1, 2]][None])
    weights, _ = route(logits, 2, normalize=True)
    assert torch.allclose(weights, (shares[[1, 2]] / shares[[1, 2]].sum())[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (128, 8), (4, 4), (3, 1)])
def test_equal_to_the_router_of_transformers(dtype: torch.dtype, experts: int, k: int) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    torch.manual_seed(experts)
    for normalize in (True, False):
        config = Qwen3MoeConfig(num_experts=experts, num_experts_per_tok=k, norm_topk_prob=normalize, hidden_size=16)
        router = Qwen3MoeTopKRouter(config).to(dtype)
        router.weight.data.normal_()
        with torch.no_grad():
            logits, scores, indices = router(torch.randn(50, 16).to(dtype))
        weights, chosen = route(logits, k, normalize)
        assert weights.dtype == torch.float32 and chosen.dtype == torch.int64
        assert torch.equal(weights.to(dtype), scores)
        if dtype == torch.float32:  # in bfloat16 equal logits are common, and the oracle breaks ties at will
            assert torch.equal(chosen, indices)


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(20, 64)
    logits[:, 50:] = 1.0
    weights, experts = route(logits, 4, normalize=True)
    assert experts.tolist() == [[50, 51, 52, 53]] * 20
    assert weights.tolist() == [[0.25] * 4] * 20


def test_no_tokens() -> None:
    weights, experts = route(torch.zeros(0, 8), 2, normalize=True)
    assert weights.shape == experts.shape == (0, 2)

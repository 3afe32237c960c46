"""Angles of positions that only a rolling window reaches."""

import torch

from exl_runtime.ops.rope import FAR, cos_sin, frequencies

INV_FREQ = frequencies(kind="default", theta=10000.0, rotary_dim=64)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    positions = torch.tensor([FAR, FAR + 1, 3 * FAR + 7, 10**9 + 1])
    cos, sin = cos_sin(INV_FREQ, positions, 1.5)
    angles = positions[:, None].double() * INV_FREQ.double()
    # The angle is rounded once below 2 pi, its cosine once more.
    assert (cos - angles.cos() * 1.5).abs().max() < 1.5 * 6e-7
    assert (sin - angles.sin() * 1.5).abs().max() < 1.5 * 6e-7


def test_positions_of_trained_models_keep_their_values_beside_far_ones() -> None:
    near = torch.arange(0, FAR, 99991)
    alone = cos_sin(INV_FREQ, near, 1.0)
    together = cos_sin(INV_FREQ, torch.cat([near, torch.tensor([FAR + 5])]), 1.0)
    plain = near[:, None].float() * INV_FREQ
    for ours, mixed, wanted in zip(alone, together, (plain.cos(), plain.sin()), strict=True):
        assert torch.equal(ours, wanted) and torch.equal(mixed[:-1], wanted)

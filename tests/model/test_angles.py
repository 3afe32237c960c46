"""Tables of angles give what is computed for each position, near the beginning and far from it."""

from dataclasses import replace

import torch

from exl_runtime.config.spec import RopeSpec
from exl_runtime.model.angles import TABLE_MOST, TABLE_STEP, Angles
from exl_runtime.model.batch import Plan

ROPE = RopeSpec(kind="default", theta=10000.0, rotary_dim=16)
ROPES = (ROPE, replace(ROPE, theta=500.0, attention_factor=1.25))


def plan_of(*parts: range) -> Plan:
    positions = [position for part in parts for position in part]
    return Plan(
        tokens=[1] * len(positions),
        positions=positions,
        slots=[*range(len(positions))],
        q_starts=[sum(len(part) for part in parts[:n]) for n in range(len(parts) + 1)],
        kv_lengths=[len(part) for part in parts],
        pages=torch.zeros(len(parts), 1, dtype=torch.int32),
        rope_lengths=(0,) * len(parts),
        logit_rows=[],
    )


def test_rows_are_the_angles_of_their_positions() -> None:
    angles, seen = Angles(ROPES, torch.device("cpu")), []
    far = 40 * TABLE_MOST
    cases = [
        [range(5)],
        [range(TABLE_MOST - 3, TABLE_MOST)],
        [range(TABLE_MOST - 3, TABLE_MOST + 3)],
        [range(TABLE_MOST + 3, TABLE_MOST + 4)],
        [range(TABLE_MOST + 4, TABLE_MOST + 5)],
        [range(far + TABLE_STEP - 2, far + 2 * TABLE_STEP - 1)],
        [range(far, far + 3 * TABLE_STEP)],
        [range(4), range(far, far + 2)],
        [range(3)],
    ]
    for parts in cases:
        plan = plan_of(*parts)
        tables, rows = angles.rows(plan)
        batch = plan.on(torch.device("cpu"))
        wanted = [part for number in range(2) for part in angles.of(number, batch)]
        for table, want in zip(tables, wanted, strict=True):
            assert (table[list(rows)] - want).abs().max() < 1e-6
        seen.append(tables)
    assert seen[3] is seen[4], "the tables are kept from token to token"

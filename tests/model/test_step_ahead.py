"""The pass behind one, begun by the native side: taken when it is asked for, else as if it had not been."""

import pytest
import torch
from driving import batch_of, new_cache, open_model
from tiny import by_name, write

from exl_runtime.model.batch import Plan
from exl_runtime.model.step import Onward

pytestmark = pytest.mark.usefixtures("room_ahead")


def test_only_the_same_pass_is_taken(tmp_path) -> None:
    """Any number that differs halts what runs ahead; its keys and values lie behind every length."""
    model = open_model(write(by_name("llama"), tmp_path), "cpu")
    prompts, pages = [[5, 9, 33, 7], [8, 4]], [[3, 1], [2, 5]]
    greedy, hot = [0.0] * 6, [1.3, 0.0, 0.4, 1.3, 0.0, 0.9]
    table = torch.tensor(pages, dtype=torch.int32)

    def plan_of(tokens: list[list[int]], past: list[int]) -> Plan:
        plan = Plan.of(batch_of([(t, p, g) for t, p, g in zip(tokens, past, pages, strict=True)], all_logits=False))
        fields = {name: getattr(plan, name) for name in Plan.__slots__}
        return Plan(**{**fields, "pages": table})

    def follow(change: str) -> tuple[list[int], tuple[int, int], torch.Tensor]:
        kv = new_cache(model)
        first = model.draw_plan(plan_of(prompts, [0, 0]), kv, greedy, [0, 0])
        ends = first[1:] if change == "ends" else (511,)
        onward = Onward(hot, [0, 0], ends)
        model.draw_plan(plan_of([[first[0]], [first[1]]], [4, 2]), kv, greedy, [0, 0], onward)
        second = model.draw_plan(plan_of([[first[0]], [first[1]]], [4, 2]), kv, greedy, [0, 0], onward)
        if change == "halt":
            model.halt()
        next_ = [[token] for token in second]
        draws, banned, past = hot, [0, 0], [5, 3]
        if change == "token":
            next_[1][0] = (next_[1][0] + 1) % 300
        elif change == "draw":
            draws = [*hot[:5], 0.1]
        elif change == "ban":
            banned = [0, 1, 7]
        elif change == "place":
            past = [5, 2]
        before = model.step.program.ahead
        found = model.draw_plan(plan_of(next_, past), kv, draws, banned)
        after = model.step.program.ahead
        keys = torch.cat([kv.keys[:, 3, :6], kv.keys[:, 2, : past[1] + 1]], dim=1)
        return found, (after[0] - before[0], after[1] - before[1]), keys

    for change in ("", "token", "draw", "ban", "place", "halt"):
        model.runs_ahead = True
        found, (taken, halted), keys = follow(change)
        model.runs_ahead = False
        wanted, _, exact = follow(change)
        assert found == wanted and torch.equal(keys, exact), change
        assert (taken, halted) == ((1, 0) if change == "" else (0, 0) if change == "halt" else (0, 1)), change


def test_what_makes_no_sense_ahead_is_refused(tmp_path) -> None:
    model = open_model(write(by_name("llama"), tmp_path), "cpu")
    plan, kv = Plan.of(batch_of([([5, 9], 0, [0])], all_logits=False)), new_cache(model)
    model.draw_plan(plan, kv, [0.0, 0.0, 0.0], [0])  # the pages and the angles are known
    for onward, why in (
        (Onward([-1.0, 0.0, 0.0], [0], ()), "temperature > 0"),
        (Onward([0.0, 0.0, 0.0], [2, 5], ()), "end within those of draw 0"),
        (Onward([0.0, 0.0, 0.0, 1.0], [0], ()), "3 numbers for each of 1 draws"),
    ):
        with pytest.raises(RuntimeError, match=why):
            model.draw_plan(plan, kv, [0.0, 0.0, 0.0], [0], onward)


def test_a_step_that_leaves_the_held_pages_or_the_angles_is_not_begun(tmp_path) -> None:
    model = open_model(write(by_name("llama"), tmp_path), "cpu")
    kv = new_cache(model)
    onward = Onward([0.0, 0.0, 0.0], [0], ())
    for length in (254, 255, 256):  # of a page of 256
        plan = Plan.of(batch_of([([7], length - 1, [2])], all_logits=False))
        for _ in range(2):
            model.draw_plan(plan, kv, [0.0, 0.0, 0.0], [0], onward)
        before = model.step.program.ahead[1]
        model.halt()
        assert model.step.program.ahead[1] - before == (length < 256)

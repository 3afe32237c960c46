"""Layers with windows keep what they see: the same replies in few pages, whatever else runs and whoever comes back.

The fake hashes what every layer sees of its own pages: a page that left too early, or that somebody else writes to,
gives other tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fakes import EOS, FakeSampler, FakeSpec, FakeTransformer, Rig, expected, logits_of, request
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_runtime.cache.geometry import pages_seen
from exl_runtime.cache.pages import PageTable
from exl_runtime.cache.pools import Pool, Pools
from exl_runtime.cache.snapshot import Identity, Snapshot, pieces, snapshot_bytes
from exl_runtime.errors import StorageError, UsageError
from exl_runtime.generation.guidance import Shadow
from exl_runtime.model.batch import ForwardBatch

SIZE, NEW, CONTEXT = 4, 8, 400
ALL_ALIKE, MIXED, TWO = (6, 6), (None, 6), (13, 6)
KINDS = [ALL_ALIKE, MIXED, TWO]


def counts(windows: Sequence[int | None], *, times: int = 1, context: int = CONTEXT) -> tuple[int, ...]:
    """Pages of every pool for so many sequences of the longest kind, and one for a copy."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
    return tuple(times * pages_seen(window, NEW, SIZE, -(-context // SIZE)) + 1 for window in kinds)


def rig_of(windows: tuple[int | None, ...], *, times: int = 1, context: int = CONTEXT, **rest: object) -> Rig:
    rest = {"pages": counts(windows, times=times, context=context), **rest}
    return Rig(spec=FakeSpec(windows=windows), context=context, prefill_tokens=NEW, **rest)


def prompt_of(count: int, start: int = 0) -> list[int]:
    return [(start + 7 * k * k + 3 * k) % 29 for k in range(count)]


def ask(rig: Rig, prompt: Sequence[int], count: int = 4, seed: int = 0, **rest: object) -> tuple[int, ...]:
    (result,) = rig.generator.run([request(prompt, count, seed=seed, **rest)])
    rig.check()
    assert result.ids == tuple(expected(prompt, count, seed=seed, windows=rig.spec.windows))
    return result


def long_seed(windows: Sequence[int | None], prompt: Sequence[int], count: int) -> int:
    """A seed with which the reply gets that long."""
    return next(s for s in range(999) if len(expected(prompt, count, seed=s, windows=windows)) == count)


@pytest.mark.parametrize("windows", KINDS)
@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_a_long_prompt_and_a_long_reply_take_few_pages(windows, speculate: str) -> None:
    prompt, rig = prompt_of(90), rig_of(windows)
    ask(rig, prompt, 120, seed=long_seed(windows, prompt, 120), speculate=speculate)
    assert sum(sum(new) for new in rig.model.passes) >= 90 + 119
    assert rig.kv.counts[-1] == pages_seen(6, NEW, SIZE, 99) + 1 == 5


def test_pages_of_a_reply_are_as_many_as_the_window_sees() -> None:
    rig = rig_of(ALL_ALIKE, times=8)
    seed = long_seed(ALL_ALIKE, prompt_of(30), 60)
    rig.generator.submit(request(prompt_of(30), 60, seed=seed))
    held = []
    while rig.generator.busy:
        rig.generator.step()
        held.append(rig.table.pages - rig.table.available)
    assert max(held) <= pages_seen(6, NEW, SIZE, 99) and max(held[-50:-1]) <= pages_seen(6, 1, SIZE, 99) + 1


@pytest.mark.parametrize("windows", KINDS)
def test_the_next_turn_finds_what_is_in_sight(windows) -> None:
    rig, said = rig_of(windows, times=2), prompt_of(50)
    for number in range(6):
        result = ask(rig, said, 9, seed=number)
        if number:
            assert result.prompt_tokens - result.reused_tokens == 4, number
        said += [*result.ids, number, 7, 11]


@pytest.mark.parametrize("windows", KINDS)
def test_an_earlier_place_is_found_while_its_pages_are_there(windows) -> None:
    rig = rig_of(windows, times=12)
    prompt = prompt_of(120)
    ask(rig, prompt, 2)
    assert ask(rig, [*prompt[:60], 30], 2).reused_tokens == 60
    assert ask(rig, [*prompt[:33], 30], 2).reused_tokens == 33
    small = rig_of(windows)
    ask(small, prompt, 2)
    reused = ask(small, [*prompt[:60], 30], 2).reused_tokens
    assert reused < 60, "what had to make room cannot be found"
    assert ask(small, [*prompt[:60], 30, 1], 2, seed=3).reused_tokens >= 60


@pytest.mark.parametrize("windows", KINDS)
def test_samples_of_one_prompt_share_it(windows) -> None:
    rig, prompt = rig_of(windows, times=5), prompt_of(45)
    results = rig.generator.run([request(prompt, 12, seed=seed) for seed in range(4)])
    rig.check()
    assert [result.ids for result in results] == [
        tuple(expected(prompt, 12, seed=seed, windows=windows)) for seed in range(4)
    ]
    assert [result.reused_tokens for result in results[1:]] == [44] * 3


@pytest.mark.parametrize("windows", KINDS)
def test_who_yields_comes_back_right(windows) -> None:
    """Too few pages for all that run: somebody has to yield, and nobody notices."""
    rig = rig_of(windows, pages=tuple(n + 3 for n in counts(windows, context=100)), context=100)
    prompts = [prompt_of(20 + 7 * k, k) for k in range(6)]
    results = rig.generator.run([request(p, 40, seed=k, speculate="off") for k, p in enumerate(prompts)])
    rig.check()
    for k, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert result.ids == tuple(expected(prompt, 40, seed=k, windows=windows))


@pytest.mark.parametrize("windows", KINDS)
def test_logits_of_a_long_text_need_few_pages(windows) -> None:
    rig, text = rig_of(windows), prompt_of(150)
    logits = rig.generator.logits(text)
    rig.check()
    for place in (0, 7, 8, 60, 149):
        assert logits[place].equal(logits_of(text[: place + 1], windows=windows))


@pytest.mark.parametrize("windows", KINDS)
def test_a_draft_model_that_lags_behind_writes_to_nobody(windows) -> None:
    draft = FakeTransformer(FakeSpec(windows=windows))
    rig = rig_of(windows, times=4, draft=draft)
    prompts = [prompt_of(40, k) for k in range(2)]
    for speculate in ("off", "draft", "auto"):
        results = rig.generator.run([request(p, 50, seed=k, speculate=speculate) for k, p in enumerate(prompts)])
        rig.check()
        for k, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            assert result.ids == tuple(expected(prompt, 50, seed=k, windows=windows))


@pytest.mark.parametrize("windows", KINDS)
def test_a_draft_model_never_writes_where_a_page_has_left(windows) -> None:
    """It reads what the reply added only when it guesses or the reply ends: by then the oldest of that has left."""
    draft = FakeTransformer(FakeSpec(windows=windows))
    rig, wrong, last = rig_of(windows, times=2, draft=draft), [], [0]

    def look(batch: ForwardBatch) -> None:
        (sequence,) = rig.generator._scheduler.running
        if int(batch.positions.min()) // SIZE < max(held.gone for held in sequence.held):
            wrong.append(batch.positions)
        last[0] = int(batch.positions.max())

    draft.before = look
    rig.generator.run([request(prompt_of(40), 60, seed=long_seed(windows, prompt_of(40), 60), speculate="off")])
    rig.check()
    assert last == [40 + 60 - 2] and not wrong


def test_guidance_begins_anew_where_its_pages_were_written_over() -> None:
    pools = Pools([Pool(PageTable(20, page_size=SIZE, loose=True), 6, 9)])
    shadow, starts, row = Shadow(range(40), scale=2.0, most=70, rope_length=0), [], torch.zeros(3)

    def compute(ids: Sequence[int], tables: Sequence[Sequence[int]], start: int, rope_length: int) -> torch.Tensor:
        assert len(tables[0]) * SIZE >= start + len(ids)
        starts.append(start)
        return torch.zeros(3)

    shadow.open(pools, NEW)
    for reply in (range(25), range(26), range(24), range(23), range(0)):
        shadow.guided(row, reply, compute=compute)
    assert starts == [0, 65, 63, 62, 0]
    shadow.release()
    assert pools[0].table.available == 20


def test_a_context_for_which_the_window_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no window"):
        rig_of(ALL_ALIKE, context=12, pages=9)


def snapshot_of(rig: Rig, tokens: Sequence[int], path: Path) -> int:
    with rig.generator.holding(tokens) as held:
        path.write_bytes(b"".join(bytes(piece) for piece in pieces(rig.kv, held, identity(rig))))
        size = snapshot_bytes(rig.kv.geometry, len(held.tokens), held.gone)
        assert abs(path.stat().st_size - size) <= 900
        count = len(held.tokens)
    rig.check()
    return count


def identity(rig: Rig) -> Identity:
    return Identity.of("model", "computed", rig.kv.geometry)


@pytest.mark.parametrize("windows", KINDS)
def test_a_snapshot_holds_what_the_next_turn_needs(windows, tmp_path: Path) -> None:
    rig, path = rig_of(windows), tmp_path / "talk.kv"
    said = [*prompt_of(100), *ask(rig, prompt_of(100), 5).ids]
    assert snapshot_of(rig, said, path) == len(said) - 1
    full = Rig(pages=101, context=CONTEXT, prefill_tokens=NEW)
    full.generator.run([request(prompt_of(100), 1)])
    whole = tmp_path / "whole.kv"
    snapshot_of(full, said, whole)
    assert path.stat().st_size < whole.stat().st_size * (0.85 if None in windows else 0.35)  # with the index
    again = rig_of(windows)
    with pytest.raises(StorageError, match="in sight of the layers"):
        Snapshot.open(whole, identity(again), again.kv.geometry)
    snapshot = Snapshot.open(path, identity(again), again.kv.geometry)
    again.generator.attach(snapshot)
    assert ask(again, [*said, 3], 4, seed=2).reused_tokens == len(said) - 1
    assert again.generator.stats.disk_tokens > 0
    again.generator.detach(snapshot)
    snapshot.close()
    again.generator.forget()
    assert ask(again, [*said, 3], 4, seed=2).reused_tokens == 0


@pytest.mark.parametrize("windows", KINDS)
def test_a_damaged_page_of_a_snapshot_is_computed_anew(windows, tmp_path: Path) -> None:
    rig, path = rig_of(windows), tmp_path / "talk.kv"
    said = [*prompt_of(60), *ask(rig, prompt_of(60), 5).ids]
    snapshot_of(rig, said, path)
    whole = path.read_bytes()
    for place in range(16, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        again = rig_of(windows)
        try:
            again.generator.attach(Snapshot.open(path, identity(again), again.kv.geometry))
        except StorageError:
            continue
        ask(again, [*said, 3], 2)


@pytest.mark.parametrize("windows", KINDS)
def test_conversations_that_push_each_other_out_come_back_from_host_memory(windows) -> None:
    rig = rig_of(windows, host_bytes=1 << 20)
    talks = [prompt_of(80, k) for k in range(3)]
    for talk in talks:
        ask(rig, talk, 2)
    for k, talk in enumerate(talks):
        assert ask(rig, [*talk, 30, k], 2).reused_tokens >= 80
    assert rig.generator.stats.host_tokens > 0
    assert ask(rig, [*talks[0][:40], 30], 2).reused_tokens == 40, "every page that left is kept there"


@pytest.mark.parametrize("windows", KINDS)
def test_guidance_goes_round_in_its_pages(windows) -> None:
    """The negative prompt is longer than what a window and a pass take."""
    prompt, negative, count = prompt_of(40), prompt_of(650, 3), 60
    pages = tuple(n + more for n, more in zip(counts(windows, context=800), (190, 140), strict=False))
    rig = rig_of(windows, context=800, pages=pages)
    sampler, ids = FakeSampler(1), []
    while len(ids) < count and EOS not in ids:
        both = (logits_of([*start, *ids], windows=windows) for start in (prompt, negative))
        with_it, against = (torch.log_softmax(logits, dim=-1) for logits in both)
        ids.append(sampler.sample(against + 2.0 * (with_it - against), prompt, ids).id)
    (result,) = rig.generator.run([request(prompt, count, seed=1, negative_prompt=tuple(negative), guidance=2.0)])
    rig.check()
    assert result.ids == tuple(ids)


@pytest.mark.parametrize("windows", KINDS)
def test_what_a_failed_request_left_behind_is_not_found(windows) -> None:
    rig = rig_of(windows, times=4)
    prompt = prompt_of(60)

    def fail(batch: object) -> None:
        if len(rig.model.passes) > 5:
            raise RuntimeError("the device is gone")

    rig.model.before = fail
    with pytest.raises(RuntimeError):
        rig.generator.run([request(prompt, 2)])
    rig.check()
    rig.model.before = lambda batch: None
    for length in (20, 30, 40):
        assert ask(rig, [*prompt[:length], 30, 1], 2).reused_tokens == 0
        rig.generator.forget()


TURN = st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 12), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 3), st.lists(TURN, min_size=1, max_size=6), st.booleans())
def test_any_mixture_of_requests(windows, times: int, turns: list[tuple[int, int, int, int]], together: bool) -> None:
    """Conversations that go on, branch and go back, one by one or all at once, in few pages or in some more."""
    rig = rig_of(windows, times=times, context=120)
    said = [[who] for who in range(3)]
    work = []
    for who, more, count, back in turns:
        prompt = [*said[who][: max(1, len(said[who]) - 9 * back)], *prompt_of(more, who)][:100]
        said[who] = [*prompt, *expected(prompt, count, windows=windows)]
        work.append((prompt, count))
    batches = [work] if together else [[one] for one in work]
    for batch in batches:
        results = rig.generator.run([request(prompt, count) for prompt, count in batch])
        rig.check()
        for (prompt, count), result in zip(batch, results, strict=True):
            assert result.ids == tuple(expected(prompt, count, windows=windows))

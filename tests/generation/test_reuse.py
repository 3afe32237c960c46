"""What the prefix cache saves: exact counts, and never a wrong token."""

from fakes import EOS, Rig, expected, request

from exl_runtime.generation.request import Result


def run(rig: Rig, *requests: object) -> list[Result]:
    results = rig.generator.run(requests)
    rig.check()
    return results


def reply(rig: Rig, prompt: list[int], count: int = 6, seed: int = 0) -> Result:
    (result,) = run(rig, request(prompt, count, seed=seed))
    assert result.ids == tuple(expected(prompt, count, seed=seed))
    return result


def test_second_turn_reuses_all_but_the_last_token() -> None:
    rig = Rig()
    prompt = [1, 2, 3, 4, 5, 6]
    for turn in range(4):
        first = reply(rig, prompt, seed=turn)
        known = len(prompt) + first.generated_tokens - 1  # the last token was never computed
        prompt = [*prompt, *first.ids, 20 + turn, 7]
        again = rig.model.passes
        again.clear()
        assert reply(rig, prompt, seed=turn + 1).reused_tokens == known
        assert again[0] == [len(prompt) - known]


def test_regenerate_recomputes_one_token() -> None:
    for length in (1, 3, 4, 5, 8, 13):
        rig = Rig()
        prompt = list(range(length))
        assert reply(rig, prompt).reused_tokens == 0
        for seed in (0, 1, 2):
            assert reply(rig, prompt, seed=seed).reused_tokens == length - 1


def test_branch_in_the_middle_of_a_page() -> None:
    rig = Rig()
    reply(rig, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert reply(rig, [1, 2, 3, 4, 5, 6, 20, 21]).reused_tokens == 6
    assert reply(rig, [1, 2, 3, 4, 5, 6, 7, 22]).reused_tokens == 7
    assert reply(rig, [1, 2, 3, 4, 5, 6, 20, 23]).reused_tokens == 7
    assert reply(rig, [1, 2, 24]).reused_tokens == 2
    assert reply(rig, [2, 1]).reused_tokens == 0


def test_a_reply_that_is_tokenized_differently_is_reused_up_to_there() -> None:
    rig = Rig()
    first = reply(rig, [1, 2, 3], seed=1)
    other = (first.ids[2] + 1) % EOS
    assert reply(rig, [1, 2, 3, first.ids[0], first.ids[1], other, 5]).reused_tokens == 5


def test_a_running_reply_shares_its_prompt() -> None:
    rig = Rig(pages=32)
    generator = rig.generator
    generator.submit(request(range(7), 20, seed=4, id="slow"))
    for _ in range(4):
        generator.step()
    (result,) = generator.run([request([*range(7), 9], 3)])
    assert result.reused_tokens == 7 and result.ids == tuple(expected([*range(7), 9], 3))
    events = []
    while generator.busy:
        events += generator.step()
    assert events[-1].result.ids == tuple(expected(range(7), 20, seed=4))
    rig.check()


def test_a_batch_with_one_beginning_computes_it_once() -> None:
    rig = Rig(pages=64, prefill_tokens=16)
    beginning = list(range(13))
    prompts = [[*beginning, 20 + k, k] for k in range(5)]
    results = run(rig, *(request(prompt, 4, seed=k) for k, prompt in enumerate(prompts)))
    assert [result.ids for result in results] == [tuple(expected(p, 4, seed=k)) for k, p in enumerate(prompts)]
    assert [result.reused_tokens for result in results] == [0, 13, 13, 13, 13]


def test_an_old_conversation_makes_room_for_a_new_one() -> None:
    rig = Rig(pages=6)
    reply(rig, list(range(12)), 8)
    reply(rig, [25, *range(15)], 8)
    assert reply(rig, list(range(12)), 1).reused_tokens < 12
    assert reply(rig, [25, *range(15)], 1).reused_tokens >= 4


def test_a_full_cache_goes_on_in_the_matched_page() -> None:
    rig = Rig(pages=2, context=8)
    assert reply(rig, [1, 2, 3, 4, 5, 6], 2).reused_tokens == 0
    assert reply(rig, [1, 2, 3, 4, 5, 9], 2).reused_tokens == 5  # nowhere to copy to: the old tail gives way
    assert reply(rig, [1, 2, 3, 4, 5, 6], 2).reused_tokens == 5

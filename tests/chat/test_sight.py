"""Which messages a window has left behind: named when all of them is out of sight, and once."""

import exl_runtime as exl
from exl_runtime.chat.sight import newly_unseen


def test_messages_that_a_window_left_behind_are_named_once(demo) -> None:
    greedy = exl.SamplingParams(temperature=0)
    with exl.load("demo", threads=1, context=768) as rt:
        chat = exl.ChatSession(rt, "The user's name is Ada.", overflow="window", sampling=greedy, max_tokens=200)
        named, gone = [], 0
        for number in range(45):
            result = chat.send(f"What is {number} and {number}?")
            if result.dropped_tokens:
                new = newly_unseen(chat, 0, result.dropped_tokens)
                assert bool(new) == (result.dropped_tokens > gone)
                named, gone = [*named, *new], result.dropped_tokens
                # What is named is out of sight, and the turn behind it is not: at least its last token is there.
                head = rt.head(chat.messages, rt.render(chat.messages).ids)
                for count, out in ((len(named), True), (len(named) + 2, False)):
                    end = len(rt.render(chat.messages[: 1 + count], add_generation_prompt=False).ids)
                    assert (end <= head + gone) == out
        assert gone >= 512 and named == [*chat.turns[: len(named)]] and not chat.forgotten

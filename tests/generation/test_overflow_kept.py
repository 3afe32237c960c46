"""Conversations that rolled or lost turns, kept in a file: opened again they cost nothing but what is new."""

from pathlib import Path

import pytest
from fakes import Rig, request
from rolling import question, rolled, turn

import exl_runtime as exl
from exl_runtime.cache.snapshot import Identity, Snapshot, pieces, snapshot_bytes
from exl_runtime.errors import StorageError


def identity(rig: Rig) -> Identity:
    return Identity.of("model", "cpu float32 exact", rig.kv.geometry)


@pytest.mark.parametrize("pages", [8, 12])
def test_a_window_goes_on_from_a_file(tmp_path: Path, pages: int) -> None:
    rig, said = Rig(context=32, pages=pages), [*range(9)]
    for number in range(12):
        said += [*turn(rig, said, 9, keep=5, seed=number).ids, 5]
        path = tmp_path / f"{number}.kv"
        with rig.generator.holding(said, keep=5) as held:
            if len(said) > 33 and pages > 8:
                assert len(held.tokens) == len(said) - 2  # the last of the reply and the one behind it
            data = b"".join(bytes(piece) for piece in pieces(rig.kv, held, identity(rig)))
            assert abs(len(data) - snapshot_bytes(rig.kv.geometry, len(held.tokens), held.missing)) < 900
            count = len(held.tokens)
        rig.check()
        path.write_bytes(data)
        other = Rig(context=32, pages=pages)
        other.generator.attach(Snapshot.open(path, identity(other), other.kv.geometry))
        for seed in (60, 61):
            result = turn(other, said, 6, keep=5, seed=seed)
            if count == len(said) - 2:
                assert result.ids == rolled(said, 6, context=32, keep=5, seed=seed)
                assert result.prompt_tokens - result.reused_tokens <= 2
        if number == 11 and pages > 8:
            smaller = Rig(context=20, pages=pages)  # it rolls otherwise: nothing of it may be found
            smaller.generator.attach(Snapshot.open(path, identity(smaller), smaller.kv.geometry))
            alone = Rig(context=20, pages=pages)
            assert turn(smaller, said, 6, keep=5).ids == turn(alone, said, 6, keep=5).ids


@pytest.mark.parametrize("overflow", ["drop", "window"])
def test_a_chat_goes_on_from_its_file(demo, tmp_path: Path, overflow: str) -> None:
    greedy, path = exl.SamplingParams(temperature=0), tmp_path / "chat.json"
    with exl.load("demo", threads=1, context=768) as rt:
        chat = exl.ChatSession(rt, "The user's name is Ada.", overflow=overflow, sampling=greedy)
        for number in range(40):
            chat.send(question(number))
        chat.save(path, kv=True)
        said = chat.send(question(41)).text
    with exl.load("demo", threads=1, context=768) as rt:
        chat = exl.ChatSession.load(path, rt)
        assert chat.kv.told() is None and chat.kv.loaded
        head = rt.head(chat.messages, rt.render(chat.messages).ids)
        result = chat.send(question(41))
        # When turns leave, the system prompt as it was first is not in the file: it is computed where it is now.
        assert result.prompt_tokens - result.reused_tokens < 22 + (head + 8 if overflow == "drop" else 0)
        assert result.text == said
        assert rt.stats.reused_from_disk > 300
        for number in range(42, 60):
            result = chat.send(question(number))
            assert result.prompt_tokens - result.reused_tokens < 22 + (head + 8 if overflow == "drop" else 0)


def test_what_a_file_says_of_turns_that_left_is_checked(tmp_path: Path) -> None:
    rig = Rig()
    rig.generator.run([request(range(9), 3)])
    right = {"past": "00" * 16, "base": "11" * 16, "head": 2, "shift": 4, "until": 5}
    for wrong in ({"head": 9}, {"until": "x"}, {"shift": -1}, {"past": "zz"}, {"base": 5}, {"past": ""}):
        with rig.generator.holding([*range(9)]) as held:
            held.more["left"] = right | wrong
            (tmp_path / "a.kv").write_bytes(b"".join(bytes(p) for p in pieces(rig.kv, held, identity(rig))))
        snapshot = Snapshot.open(tmp_path / "a.kv", identity(rig), rig.kv.geometry)
        with pytest.raises(StorageError, match="cannot be"):
            rig.generator.attach(snapshot)

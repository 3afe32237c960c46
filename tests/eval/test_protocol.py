"""How a text becomes windows: against the published loops written out again, and in bounded memory."""

import argparse
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import eval_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.data import TextData
from eval.protocol import (
    PRESETS,
    Protocol,
    Window,
    add_protocol,
    chosen_protocol,
    conditions,
    count_windows,
    fitted,
    windows,
)
from exl_runtime.console.program import StrictParser
from exl_runtime.console.progress import QuietReporter
from exl_runtime.errors import DataError, UsageError
from exl_runtime.texts import tokens
from exl_runtime.tokenizer.tokenizer import Tokenizer

BOS = eval_models.BOS


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Tokenizer]:
    """By whether it adds BOS."""
    made = {}
    for bos in (True, False):
        folder = tmp_path_factory.mktemp("tokenizer")
        eval_models.write_tokenizer(folder, bos=bos)
        made[bos] = Tokenizer.open(folder)
    return made


def data_of(read: Callable[[bool], Iterator[str]], most: int | None = None) -> TextData:
    return TextData(
        name="mine", paths=(), sha256="0123456789abcdef" * 4, read=read, joined="joined", raw="raw", most_windows=most
    )


def text_data(text: str, most: int | None = None) -> TextData:
    return data_of(lambda raw: iter([text]), most)


def text_of(characters: int) -> str:
    return "".join(eval_models.CHARACTERS[(7 * i * i + i) % 96] for i in range(characters))


# --- the published loops, on all ids at once --------------------------------------------------------------------------


def gptq(ids: list[int], length: int) -> list[Window]:
    return [Window(tuple(ids[i * length : (i + 1) * length]), 1) for i in range(len(ids) // length)]


def exl2(ids: list[int], length: int, stride: int, rows: int) -> list[Window]:
    starts = [a for a in range(0, len(ids), stride) if a + length <= len(ids)][:rows]
    return [Window(tuple(ids[a : a + length]), 1) for a in starts]


def llamacpp(ids: list[int], length: int, bos: int | None) -> list[Window]:
    made = []
    for chunk in range(len(ids) // length):
        tokens = ids[chunk * length : (chunk + 1) * length]
        if bos is not None:
            tokens[0] = bos
        # Logits length/2 ... length - 2 predict the tokens one further on.
        made.append(Window(tuple(tokens), length // 2 + 1))
    return made


def hugging_face(ids: list[int], length: int, stride: int) -> list[Window]:
    made, scored_to = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        fresh = end - scored_to
        first = max(1, end - begin - fresh)  # the loss never sees the label of the first token
        if first < end - begin:
            made.append(Window(tuple(ids[begin:end]), first))
        scored_to = end
        if end == len(ids):
            break
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 200), st.integers(4, 12), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(1, 50)
)
def test_windows_are_those_of_the_published_loops(
    tokenizers: dict[bool, Tokenizer], characters: int, length: int, stride: int, rows: int, bos: bool, piece: int
) -> None:
    stride = min(stride, length)
    text = text_of(characters)
    ids = [BOS] * bos + eval_models.ids_of(text)
    data = data_of(lambda raw: (text[at : at + piece] for at in range(0, len(text), piece)))
    for protocol, expected in (
        (Protocol(name="gptq", length=length, stride=length), gptq(ids, length)),
        (Protocol(name="exl2", length=length, stride=stride, rows=rows), exl2(ids, length, stride, rows)),
        (
            Protocol(name="llamacpp", length=length, stride=length, scored="half", each_bos=True, raw=True),
            llamacpp(ids, length, BOS if bos else None),
        ),
        (
            Protocol(name="stride", length=length, stride=stride, scored="new", tail=True),
            hugging_face(ids, length, stride),
        ),
    ):
        if len(ids) < length:
            with pytest.raises(DataError, match=f"mine: {len(ids)} tokens, one window of the .* has {length}"):
                list(windows(protocol, data, tokenizers[bos]))
            with pytest.raises(DataError, match=f"mine: {len(ids)} tokens"):
                count_windows(protocol, data, tokenizers[bos])
            continue
        assert list(windows(protocol, data, tokenizers[bos])) == expected
        assert count_windows(protocol, data, tokenizers[bos]) == len(expected)


def test_stride_scores_every_token_but_the_first_once(tokenizers: dict[bool, Tokenizer]) -> None:
    text = text_of(1003)
    protocol = Protocol(name="stride", length=64, stride=24, scored="new", tail=True)
    made = list(windows(protocol, text_data(text), tokenizers[False]))
    assert [token for window in made for token in window.ids[window.first :]] == eval_models.ids_of(text)[1:]
    assert all(1 <= window.first < len(window.ids) for window in made)


def test_presets_are_the_published_ones() -> None:
    sizes = {name: (p.length, p.stride, p.rows, p.length - p.first, p.raw) for name, p in PRESETS.items()}
    assert sizes == {
        "gptq": (2048, 2048, None, 2047, False),
        "exl2": (2048, 512, 20, 2047, False),
        "llamacpp": (512, 512, None, 255, True),
        "stride": (2048, 512, None, 512, False),
    }


def test_a_limit_of_the_data_counts_unless_rows_are_given(tokenizers: dict[bool, Tokenizer]) -> None:
    data = text_data(text_of(400), most=3)
    protocol = Protocol(name="gptq", length=10, stride=10)
    wide = Protocol(name="gptq", length=10, stride=10, rows=7)
    assert len(list(windows(protocol, data, tokenizers[True]))) == count_windows(protocol, data, tokenizers[True]) == 3
    assert len(list(windows(wide, data, tokenizers[True]))) == count_windows(wide, data, tokenizers[True]) == 7


def test_text_that_spells_a_control_token_stays_text(tokenizers: dict[bool, Tokenizer]) -> None:
    text = "before <s> behind" * 3
    (window,) = windows(Protocol(name="gptq", length=51, stride=51), text_data(text), tokenizers[False])
    assert list(window.ids) == eval_models.ids_of(text)


@pytest.mark.parametrize("name", ["ember-6m", "llama2", "smollm2", "qwen2.5"])
def test_ids_are_those_of_the_whole_text(name: str, shared: Path) -> None:
    """The text is encoded piece by piece; the published numbers encode it at once, with transformers."""
    transformers = pytest.importorskip("transformers")
    folder = shared / ("models" if name == "ember-6m" else "tokenizers") / name
    # More than two of the pieces, and it begins as the rows joined do.
    text = "\n\n" + (shared / "data" / "wikitext2.test.raw").read_text(encoding="utf-8")[2:200_000]
    expected = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    protocol = Protocol(name="gptq", length=512, stride=512)
    made = list(windows(protocol, text_data(text), Tokenizer.open(folder)))
    assert [token for window in made for token in window.ids] == expected[: len(expected) // 512 * 512]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_text_without_end_is_read_as_far_as_needed(tokenizers: dict[bool, Tokenizer]) -> None:
    read = 0

    def endless(raw: bool) -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "a line of text\n" * 100

    protocol = Protocol(name="exl2", length=50, stride=20, rows=5)
    assert len(list(windows(protocol, data_of(endless), tokenizers[True]))) == 5
    assert count_windows(protocol, data_of(endless), tokenizers[True]) == 5
    assert read < 200


@pytest.mark.parametrize("name", ["gptq", "exl2", "llamacpp", "stride"])
def test_memory_does_not_grow_with_the_text(
    name: str, tokenizers: dict[bool, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE", 2048)
    line = "a line of text in a very long file of text\n"

    def peak(lines: int) -> int:
        data = data_of(lambda raw: (line for _ in range(lines)))
        tracemalloc.start()
        try:
            for window in windows(small(name), data, tokenizers[True]):
                assert len(window.ids) > 1
            count_windows(small(name), data, tokenizers[True])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is made once
    assert peak(1200) < 1.5 * peak(150)


def small(name: str) -> Protocol:
    """All of the text in windows of 256."""
    stride = 256 if PRESETS[name].stride == PRESETS[name].length else 128
    return replace(PRESETS[name], length=256, stride=stride, rows=None)


# --- arguments --------------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    parser = StrictParser()
    add_protocol(parser, "gptq")
    return parser.parse_args(arguments)


def test_options_override_the_preset() -> None:
    assert chosen_protocol(parsed()) == PRESETS["gptq"]
    protocol = chosen_protocol(parsed("--protocol", "exl2", "--length", "64", "--stride", "32", "--rows", "3"))
    assert (protocol.length, protocol.stride, protocol.rows, protocol.scored) == (64, 32, 3, "all")
    assert chosen_protocol(parsed("--length", "64")).stride == 64
    assert chosen_protocol(parsed("--protocol", "exl2", "--length", "64")).stride == 16
    assert chosen_protocol(parsed("--length", "4096")).stride == 4096
    assert chosen_protocol(parsed("--protocol", "stride", "--length", "4096")).stride == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", "1"), "windows of 1 tokens score nothing"),
        (("--protocol", "llamacpp", "--length", "2"), "windows of 2 tokens score nothing"),
        (("--length", "64", "--stride", "65"), "a stride of 65 tokens with windows of 64"),
        (("--rows", "0"), "'0' is not a whole number from 1 up"),
        (("--length", "many"), "'many' is not a whole number"),
        (("--protocol", "best"), "invalid choice: 'best'"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        chosen_protocol(parsed(*arguments))
    assert "\n" not in caught.value.problem


def test_the_line_says_how_to_repeat_it(tokenizers: dict[bool, Tokenizer], demo: Path) -> None:
    data = text_data("x")
    line = PRESETS["exl2"].describe(data, tokenizers[True])
    for part in ("exl2: mine (sha256 0123456789ab), joined", "2048 tokens every 512, the first 20", "BOS once, before"):
        assert part in line
    assert "no BOS" in PRESETS["exl2"].describe(data, tokenizers[False])
    assert "if the tokenizer adds one" in PRESETS["exl2"].describe(data)
    line = PRESETS["llamacpp"].describe(data, tokenizers[True])
    for part in ("raw", "512 tokens side by side, all", "last 255 tokens", "BOS in place of the first token"):
        assert part in line
    assert "512 new tokens" in PRESETS["stride"].describe(data) and "shorter last" in PRESETS["stride"].describe(data)
    assert "the first 3" in PRESETS["gptq"].describe(text_data("x", most=3))
    import exl_runtime as exl

    with exl.load(demo, cache="fp16", context=64, threads=1, backend="reference") as runtime:
        line = conditions(runtime)
    assert line == f"cache fp16; activations fp32; reference kernels on cpu; exl-runtime {exl.__version__}"


def test_windows_shrink_to_the_context_of_the_model_with_a_warning(demo: Path) -> None:
    reporter = QuietReporter()
    protocol = fitted(PRESETS["exl2"], demo, reporter, explicit=False)
    assert (protocol.length, protocol.stride, len(reporter.warned)) == (1024, 512, 1)
    assert "made for 1024 tokens" in reporter.warned[0] and "2048" in reporter.warned[0]
    assert fitted(PRESETS["gptq"], demo, reporter, explicit=False).stride == 1024
    reporter = QuietReporter()
    assert fitted(PRESETS["llamacpp"], demo, reporter, explicit=False) == PRESETS["llamacpp"]
    assert fitted(PRESETS["gptq"], demo, reporter, explicit=True) == PRESETS["gptq"]
    assert not reporter.warned

"""Token rows for calibration, out of files. Knows no model."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exl_runtime.errors import ConvertError
from exl_runtime.texts.documents import read_documents, regroup
from exl_runtime.texts.tokens import Encode, encoded, plain_encoder, token_pieces
from exl_runtime.tokenizer.tokenizer import Tokenizer

_SPAN_PER_TOKEN = 8  # characters of a span per token of a row: two rows of English, five of Chinese
_SHORTEST_SPAN = 2**12  # characters


def rows_from_files(
    paths: Sequence[Path], tokenizer: Tokenizer, *, rows: int, length: int, bos_id: int | None, seed: int = 0
) -> Tensor:
    """int64 (rows, length) on the CPU: each row `bos_id` (unless None), then running text of one place in one file.

    Every file gives an equal share; what a short one lacks, the others give. A file with more text than its share
    gives rows spread evenly over all of it. Files shorter than a row are joined, in the order of `paths`, and count
    as one. Rows alternate between files and are shuffled within each (by `seed`), so that the first n rows are a fair
    choice as well. The same arguments give the same rows.

    Time grows with the size of the files only as reading does: of a long file, evenly spread spans are kept while
    reading (about 8 to 16 characters for every token of its share), and only those are tokenized.

    Raises ConvertError for too little text (found, wanted, what to do), and as `read_documents` does.
    """
    _require(len(paths) > 0, "no file with calibration text given")
    _require(rows >= 1, f"calibration takes at least 1 row, not {rows}")
    body = length if bos_id is None else length - 1
    _require(body >= 1, f"a row of {length} tokens holds no text")
    encode = plain_encoder(tokenizer)
    draw = random.Random(seed)
    sources = [source[_spread(len(source), count, draw)] for source, count in _shares(paths, encode, body, rows)]
    text = torch.from_numpy(np.stack(list(_alternately(sources))).astype(np.int64))
    return text if bos_id is None else torch.cat([torch.full((rows, 1), bos_id), text], dim=1)


def random_rows(
    vocab_size: int, rows: int, length: int, seed: int, exclude: Iterable[int], bos_id: int | None = None
) -> Tensor:
    """int64 (rows, length) on the CPU: ids drawn uniformly from 0 ... vocab_size - 1 without `exclude`.

    exclude   ids that text never has: `Tokenizer.special_ids`, rows of the embedding without a token
    bos_id    when not None, the first id of every row
    """
    _require(rows >= 0 and length >= 1, f"{rows} random rows of {length} tokens cannot be made")
    excluded = frozenset(exclude)
    allowed = torch.tensor([index for index in range(vocab_size) if index not in excluded], dtype=torch.int64)
    _require(len(allowed) > 0, f"no id to draw random rows from: all {vocab_size} are excluded")
    drawn = allowed[torch.randint(len(allowed), (rows, length), generator=torch.Generator().manual_seed(seed))]
    if bos_id is not None:
        drawn[:, 0] = bos_id
    return drawn


def token_stream(paths: Sequence[Path], tokenizer: Tokenizer, limit: int | None = None) -> Tensor:
    """int64 (tokens,) on the CPU: all files one after another, no BOS, at most `limit` tokens.

    Reading stops at `limit`; without one, memory grows with the text. Raises ConvertError as `read_documents` does.
    """
    _require(len(paths) > 0, "no file with text given")
    _require(limit is None or limit >= 1, f"the limit of tokens must be at least 1, not {limit}")
    parts, found = [], 0
    for part in token_pieces(paths, tokenizer):
        parts.append(part)
        found += len(part)
        if limit is not None and found >= limit:
            break
    return torch.from_numpy(_joined(parts)[:limit].astype(np.int64))


# --- which rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sample:
    """What was tokenized of one file.

    segments   int32 (n, body), in the file's order
    tail       int32, fewer than `body` ids behind the last segment; empty when `thinned`
    thinned    the file has more than the segments show
    """

    segments: np.ndarray
    tail: np.ndarray
    thinned: bool


def _shares(paths: Sequence[Path], encode: Encode, body: int, rows: int) -> list[tuple[np.ndarray, int]]:
    """(segments, how many of them to take) of every source; the counts sum to `rows`."""
    need = [math.ceil(rows / len(paths))] * len(paths)
    samples = [_sample(path, encode, body, count) for path, count in zip(paths, need, strict=True)]
    while True:
        sources = [sample.segments for sample in samples]
        short = [s for s in samples if not s.thinned and len(s.segments) == 0]
        joined, rest = _cut(_joined([s.tail for s in short]), body)
        sources.append(joined)
        room = [rows if s.thinned else len(s.segments) for s in samples] + [len(joined)]
        if sum(room) < rows:  # so no file is thinned, and these are all the tokens there are
            last, rest = _cut(_joined([s.tail for s in samples if len(s.segments)] + [rest]), body)
            sources.append(last)
            room.append(len(last))
        if sum(room) < rows:
            found = sum(room) * body + len(rest)
            raise ConvertError(
                f"too little calibration text: {found} tokens in {_named(paths)}, "
                f"{rows * body} wanted ({rows} rows of {body})",
                hint=f"give more text, or lower --rows (to {sum(room)}) or --length"
                if sum(room)
                else "give more text, or lower --length",
            )
        counts = _round_robin(room, rows)
        lacking = [i for i, s in enumerate(samples) if len(s.segments) < counts[i]]
        if not lacking:
            return list(zip(sources, counts, strict=True))
        for i in lacking:  # a thinned file must give more than an equal share, or has very long tokens
            need[i] = max(2 * need[i], counts[i])
            samples[i] = _sample(paths[i], encode, body, need[i])


def _sample(path: Path, encode: Encode, body: int, need: int) -> _Sample:
    """Tokenize `path`, or `need` to 2 * `need` spans of it, evenly spread."""
    size = max(_SPAN_PER_TOKEN * body, _SHORTEST_SPAN)
    spans, stride = [], 1
    for index, span in enumerate(regroup(read_documents(path), size)):
        if index % stride:
            continue
        spans.append(span)
        if len(spans) > 2 * need:
            spans, stride = spans[::2], 2 * stride
    if stride == 1:
        segments, tail = _cut(_joined(encoded(spans, encode)), body)
        return _Sample(segments, tail, False)
    pieces = [_cut(_int32(encode(span, index > 0)), body)[0] for index, span in enumerate(spans)]
    return _Sample(np.concatenate(pieces), _int32([]), True)


def _cut(tokens: np.ndarray, body: int) -> tuple[np.ndarray, np.ndarray]:
    whole = len(tokens) // body * body
    return tokens[:whole].reshape(-1, body), tokens[whole:]


def _round_robin(room: Sequence[int], rows: int) -> list[int]:
    """How many of `rows` (at most the sum of `room`) each source gives when they take turns."""
    counts = [0] * len(room)
    while rows:
        for index in range(len(room)):
            if rows and counts[index] < room[index]:
                counts[index] += 1
                rows -= 1
    return counts


def _spread(n: int, count: int, draw: random.Random) -> list[int]:
    """`count` (at most n) of n indices, evenly spaced from a random start, shuffled."""
    start = draw.randrange(max(n, 1))
    picks = [(i * n + start) // count for i in range(count)]
    draw.shuffle(picks)
    return picks


def _alternately(sources: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    waiting = [iter(source) for source in sources]
    while waiting:
        turn = [(source, next(source, None)) for source in waiting]
        waiting = [source for source, row in turn if row is not None]
        yield from (row for _, row in turn if row is not None)


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([_int32([]), *parts])


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files ({paths[0]}, ...)"


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConvertError(problem)

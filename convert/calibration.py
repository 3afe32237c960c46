"""The rows of tokens that a conversion looks at: from files, or sampled from the source model itself.

No foreign text is shipped. A model's own samples are free, in its own languages and formats, and nearly as good as
real text (LOG.md); text of the kind the model will meet is still a little better, so files come first when given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl_runtime.config import ModelSpec
from exl_runtime.console.progress import Progress
from exl_runtime.errors import ConvertError, TemplateError, TokenizerError
from exl_runtime.tokenizer.template import ChatTemplate
from exl_runtime.tokenizer.tokenizer import Tokenizer

from .openings import OPENINGS, chat_openings
from .rows import random_rows, rows_from_files
from .sample import sample_rows
from .source import Source

TEMPERATURES = (1.0, 1.0, 1.0, 0.8)  # of sampled rows, in turn; hotter text is less like any real one (LOG.md)
RANDOM_SHARE = 64  # one row in so many is uniformly random: rare tokens occur at all
CHAT_EVERY = 3  # one opening in so many is a chat, where the model has a template
HELD_OUT = 8  # one row in so many, and at least as many rows, is kept for judging
SAMPLED_DATASET = "(sampled from the source model)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """rows, held_out int64 (rows, length): to encode with, and to judge with. protocol: how they were made."""

    rows: Tensor
    held_out: Tensor
    dataset: str
    protocol: str


def default_size(spec: ModelSpec) -> tuple[int, int]:
    """(rows, length): enough tokens for the least squares of the widest matrix (encoder.md 3), within reason."""
    length = min(512, spec.context_length)
    widest = max(max(spec.hidden_size, layer.mlp.intermediate_size) for layer in spec.layers)
    tokens = min(max(98304, 16 * widest), 131072)
    return max(16, tokens // length), length


def make(
    source: Source,
    *,
    files: Sequence[Path],
    rows: int,
    length: int,
    seed: int,
    memory: int | None,
    progress: Progress,
) -> Calibration:
    """Rows for encoding and further ones for judging. Raises ConvertError, TokenizerError."""
    held = max(HELD_OUT, rows // HELD_OUT)
    bos = source.spec.bos_id
    if files:
        tokenizer = Tokenizer.open(source.folder)
        every = rows_from_files(files, tokenizer, rows=rows + held, length=length, bos_id=bos, seed=seed)
        _require_ids(every, source.spec)
        names = ", ".join(path.name for path in files)
        step = every.shape[0] // held
        chosen = torch.zeros(every.shape[0], dtype=torch.bool)
        chosen[torch.arange(held) * step] = True
        return Calibration(
            rows=every[~chosen],
            held_out=every[chosen],
            dataset=names,
            protocol=f"{rows} rows of {length} tokens from {names}, spread evenly; {held} more held out for judging",
        )
    starts, chats = _openings(source)
    noise = max(1, rows // RANDOM_SHARE)
    with progress.stage("sampling calibration text", rows + held - noise, "rows") as bar:
        done = 0

        def advance(tokens: int, total: int) -> None:
            nonlocal done
            now = (rows + held - noise) * tokens // total
            bar.advance(now - done)
            done = now

        sampled = sample_rows(
            source,
            rows=rows + held - noise,
            length=length,
            temperatures=TEMPERATURES,
            seed=seed,
            openings=starts,
            progress=advance,
            memory=memory,
        )
    special = [i for i in (source.spec.bos_id, source.spec.pad_id, *source.spec.eos_ids) if i is not None]
    random = random_rows(source.spec.vocab_size, noise, length, seed, special, bos_id=bos)
    protocol = (
        f"{rows} rows of {length} tokens: {rows - noise} sampled from the source model (temperatures "
        f"{', '.join(f'{t:g}' for t in TEMPERATURES)}; {len(starts)} openings, {chats} of them chats), {noise} of "
        f"uniformly random tokens; {held} more sampled rows held out for judging"
    )
    return Calibration(
        rows=torch.cat([sampled[held:], random]),
        held_out=sampled[:held],
        dataset=SAMPLED_DATASET,
        protocol=protocol,
    )


def _openings(source: Source) -> tuple[list[list[int]], int]:
    """Openings in ids, in the order they are used, and how many of them are chats."""
    bos = [] if source.spec.bos_id is None else [source.spec.bos_id]
    try:
        tokenizer = Tokenizer.open(source.folder)
    except TokenizerError:
        raise ConvertError(
            f"{source.folder}: no usable tokenizer, which sampling calibration text needs",
            hint="complete the folder with its tokenizer.json",
        ) from None
    texts = [bos + tokenizer.encode(text, add_bos=False, parse_special=False) for text in OPENINGS]
    texts = [ids for ids in texts if ids] or [[0]]
    try:
        template = ChatTemplate.open(source.folder, tokenizer)
        chats = [list(ids) for ids in chat_openings(lambda messages: template.encode(messages)[1])]
    except TemplateError:
        chats = []
    vocab = source.spec.vocab_size
    texts = [ids for ids in texts if max(ids) < vocab]
    chats = [ids for ids in chats if ids and max(ids) < vocab]
    if not texts:
        raise ConvertError(
            f"{source.folder}: its tokenizer gives ids that the model does not have ({vocab} tokens)",
            hint="the tokenizer belongs to another model",
        )
    mixed: list[list[int]] = []
    turn = 0
    for number, text in enumerate(texts):
        mixed.append(text)
        if chats and number % (CHAT_EVERY - 1) == CHAT_EVERY - 2:
            mixed.append(chats[turn % len(chats)])
            turn += 1
    return mixed, min(turn, len(chats))


def _require_ids(rows: Tensor, spec: ModelSpec) -> None:
    if int(rows.max()) >= spec.vocab_size:
        raise ConvertError(
            f"the tokenizer gives token {int(rows.max())}, the model has {spec.vocab_size}",
            hint="the tokenizer belongs to another model",
        )

"""Streams of small unsigned codes inside 32-bit words: unpack and pack. Knows no scales, groups or checkpoint names.

Layout of one column (formats/exl2.md 3.1): bit j of code i is stream position i * bits + j; the stream is cut into
words, position p being bit p % 32 of word p // 32. EXL2 and GPTQ weights run down the rows, GPTQ zero-points run along
the columns. In a block of `BLOCK_CODES[bits]` codes every code and every word is whole:

    bits          1   2   3   4   5   6   8
    codes        32  16  32   8  32  16   4
    words         1   1   3   1   5   3   1
"""

import torch
from torch import Tensor

BLOCK_CODES = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 4}
PLANES = (8, 4, 2, 1)  # widths a bit plane may have, widest first


def unpack_rows(words: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Codes of a stream that runs down the rows.

    words: int32 (R, N), R a multiple of the words in one block. Returns `dtype` (R * 32 / bits, N).
    """
    rows, columns = words.shape
    codes_per_block = BLOCK_CODES[bits]
    words_per_block = codes_per_block * bits // 32
    if rows % words_per_block:
        raise ValueError(f"{rows} words are not whole blocks of {words_per_block} at {bits} bits")
    blocks = words.reshape(rows // words_per_block, words_per_block, columns)
    codes = torch.empty(rows // words_per_block, codes_per_block, columns, dtype=dtype, device=words.device)
    mask = (1 << bits) - 1
    for i in range(codes_per_block):
        word, offset = divmod(i * bits, 32)
        code = blocks[:, word] >> offset
        if offset + bits > 32:
            low = 32 - offset  # bits of this code that lie in the first of its two words
            code = (code & ((1 << low) - 1)) | (blocks[:, word + 1] << low)
        codes[:, i] = code & mask  # the mask also removes the sign that an arithmetic shift drags in
    return codes.flatten(0, 1)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_rows`: integer codes (rows, N), rows a multiple of the codes in one block -> int32 words.

    Raises ValueError for a code outside 0 .. 2^bits - 1 or a partial block.
    """
    rows, columns = codes.shape
    codes_per_block = BLOCK_CODES[bits]
    words_per_block = codes_per_block * bits // 32
    if rows % codes_per_block:
        raise ValueError(f"{rows} codes are not whole blocks of {codes_per_block} at {bits} bits")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"codes {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    blocks = codes.reshape(rows // codes_per_block, codes_per_block, columns)
    words = torch.zeros(rows // codes_per_block, words_per_block, columns, dtype=torch.int64, device=codes.device)
    for i in range(codes_per_block):
        word, offset = divmod(i * bits, 32)
        code = blocks[:, i].to(torch.int64)
        words[:, word] |= (code << offset) & 0xFFFFFFFF
        if offset + bits > 32:
            words[:, word + 1] |= code >> (32 - offset)
    return to_int32(words).flatten(0, 1)


def unpack_columns(words: Tensor, bits: int, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Codes of streams that run along the rows of `words`: int32 (G, W) -> `dtype` (G, count).

    W is ceil(count * bits / 32); the last block may be partial.
    """
    sideways = _pad_rows(words.t(), BLOCK_CODES[bits] * bits // 32)
    return unpack_rows(sideways, bits, dtype)[:count].t().contiguous()


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_columns`: integer codes (G, N) -> int32 (G, ceil(N * bits / 32)), unused bits zero."""
    words = -(-codes.shape[1] * bits // 32)
    sideways = _pad_rows(codes.t(), BLOCK_CODES[bits])
    return pack_rows(sideways, bits)[:words].t().contiguous()


def unpack_planar_rows(words: Tensor, bits: int) -> Tensor:
    """Codes stored as bit planes (formats/gptq.md 7): int32 (R, N), R a multiple of `bits` -> uint8 (R * 32 / bits, N).

    32 rows are `bits` words. The widest plane (8, 4, 2 or 1 bits) that fits comes first and holds the lowest bits.
    """
    columns = words.shape[1]
    blocks = words.reshape(-1, bits, columns)
    codes = torch.zeros(blocks.shape[0] * 32, columns, dtype=torch.uint8, device=words.device)
    done = 0
    for width in PLANES:
        if bits & width:
            plane = blocks[:, done : done + width].reshape(-1, columns)
            codes |= unpack_rows(plane, width) << done
            done += width
    return codes


def unpack_planar_columns(words: Tensor, bits: int, count: int) -> Tensor:
    """`unpack_planar_rows` turned sideways, for zero-points: int32 (G, W) -> uint8 (G, count)."""
    return unpack_planar_rows(_pad_rows(words.t(), bits), bits)[:count].t().contiguous()


def to_int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64 values, read as a signed 32-bit integer."""
    sign = 0x80000000
    return (((words & 0xFFFFFFFF) ^ sign) - sign).to(torch.int32)


def _pad_rows(rows: Tensor, multiple: int) -> Tensor:
    missing = -rows.shape[0] % multiple
    if not missing:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])

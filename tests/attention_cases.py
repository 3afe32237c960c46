"""Ragged batches over scattered pages for the tests of CUDA attention, and what they should give."""

from dataclasses import dataclass

import torch

from exl_runtime.ops import kv_quant

CPU = torch.device("cpu")


@dataclass
class Case:
    """`sequences`: (new tokens, keys in all). `bits`: widths of keys and values in quantized pages; None: `dtype`."""

    sequences: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    bits: tuple[int, int] | None = None
    window: int | None = None
    softcap: float | None = None
    page: int = 32
    device: torch.device = CPU

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(len(self.sequences) + self.head_dim)
        counts = [-(-length // self.page) for _, length in self.sequences]
        order = torch.randperm(sum(counts) + 2, generator=random)  # two pages belong to nobody
        shape = (len(order), self.page, self.kv_heads, self.head_dim)
        floats = [torch.randn(shape, generator=random) for _ in "kv"]
        if self.bits is None:
            held = [x.to(self.dtype) for x in floats]
            self.wide = [x.double() for x in held]
        else:
            held = [kv_quant.quantize(x, bits) for x, bits in zip(floats, self.bits, strict=True)]
            self.wide = [
                kv_quant.dequantize(x, self.head_dim, bits).double() for x, bits in zip(held, self.bits, strict=True)
            ]
        self.table = torch.full((len(counts), max(counts, default=0)), -1, dtype=torch.int32)
        for s, pages in enumerate(order.split([*counts, 2])[:-1]):
            self.table[s, : counts[s]] = pages
        self.k_pages, self.v_pages = (x.to(self.device) for x in held)
        self.pages = self.table.to(self.device)
        self.news = [new for new, _ in self.sequences]
        self.lengths = torch.tensor([length for _, length in self.sequences], dtype=torch.int32)
        self.q = torch.randn(sum(self.news), self.heads, self.head_dim, generator=random).half().to(self.device)
        self.scale = 1.5 * self.head_dim**-0.5

    def arguments(self) -> tuple:
        """Of `base.PagedAttention`."""
        starts = torch.tensor([0, *self.news]).cumsum(0).to(torch.int32).to(self.device)
        lengths = self.lengths.to(self.device)
        return self.q, self.k_pages, self.v_pages, starts, lengths, self.pages, self.scale, self.window, self.softcap

    def parts(self, size: int) -> list["Case"]:
        """The same rows as batches of one sequence, `size` queries at a time."""
        cases, row = [], 0
        for s, (new, length) in enumerate(self.sequences):
            for start in range(0, new, size):
                count = min(size, new - start)
                part = object.__new__(Case)
                part.__dict__.update(self.__dict__)
                part.news, part.q = [count], self.q[row : row + count]
                part.lengths = torch.tensor([length - new + start + count], dtype=torch.int32)
                part.pages = self.pages[s : s + 1]
                cases.append(part)
                row += count
        return cases

    def dense(self, *, halves: bool) -> torch.Tensor:
        """Float64 over gathered keys. `halves`: with the roundings that tensor cores ask for, and no other error."""

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.half().double() if halves else x

        def turned(x: torch.Tensor) -> torch.Tensor:
            return x if self.bits is None else rotate(x)

        out, row = [torch.zeros(0, self.heads, self.head_dim, dtype=torch.float64)], 0
        group = self.heads // self.kv_heads
        for s, (new, length) in enumerate(self.sequences):
            held = self.table[s, : -(-length // self.page)].long()
            k, v = (x[held].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in self.wide)
            q = rounded(turned(self.q[row : row + new].cpu().double()))
            scores = torch.einsum("thd,jhd->htj", q, turned(k)) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
            hidden = (distance < 0) | (distance >= (self.window or length))
            scores = scores.masked_fill(hidden, float("-inf"))
            weights = rounded(torch.exp(scores - scores.amax(-1, keepdim=True)))
            mixed = torch.einsum("htj,jhd->thd", weights, rounded(turned(v))) / weights.sum(-1).T[..., None]
            out.append(rounded(turned(mixed)))
            row += new
        return torch.cat(out)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """`kv_quant.rotate` in float64, by the matrix."""
    return x @ kv_quant.rotate(torch.eye(x.shape[-1])).double()

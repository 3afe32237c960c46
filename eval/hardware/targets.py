"""Figures of the stages -> the rows that a card has to show: measured, floor, target, met or not. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..speed.cases import DEQUANT
from .running import Result

DATA_CENTRE = ((8, 0), (9, 0), (10, 0), (10, 3))  # compute capabilities of cards with stacked memory
Figures = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What stands above the table."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    torch: str
    cores: int

    @property
    def share(self) -> float:
        """Of the copy bandwidth, what decoding has to reach: fast memory is harder to keep busy."""
        return 0.70 if self.capability in DATA_CENTRE else 0.88


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target. met: None where nothing was measured, and `note` says why."""

    name: str
    measured: str = "-"
    floor: str = "-"
    target: str
    met: bool | None = None
    note: str = ""


def rows_of(found: Mapping[str, Result], card: Card) -> list[Row]:
    """All rows, in the order of the targets."""
    share = f">= {100 * card.share:.0f} % of the floor"
    makers: Sequence[tuple[str, str, tuple[str, ...], Callable[..., Row]]] = (
        ("large model, EXL2 4.0, batch 1", share, ("speed-large",), _decode(card)),
        ("small model, EXL2 4.0, against exllamav2", ">= 1.5 x", ("speed-small-exllamav2",), _exllama),
        ("fixed cost of a step, small model", "<= 0.25 ms", ("step-small",), _fixed),
        ("fixed cost of a step, large model", "<= 0.25 ms", ("step-large",), _fixed),
        ("batch 8, step rate", ">= 80 % of batch 1", ("speed-large", "speed-large-8"), _batch),
        ("64 rows, against dequantizing and multiplying", ">= 4 x", ("kernels",), _rows64),
        ("prompt of 2048, against torch fp16", ">= 80 %", ("prefill",), _prefill),
        ("attention over 32768 keys of q4", "<= 1.3 x the floor", ("attention",), _attention),
        ("first build of the kernels", "< 90 s on 8 cores", ("build",), _build(card)),
        ("tests on the card", "all pass", ("tests",), _tests),
        ("compute-sanitizer", "clean", ("sanitizer",), _tests),
    )
    rows = []
    for name, target, needed, make in makers:
        missing = [
            f"{key}: {found[key].why if key in found else 'not run'}" for key in needed if not _there(found, key)
        ]
        if missing:
            rows.append(Row(name=name, target=target, note="not measured; " + "; ".join(missing)))
            continue
        rows.append(make(name, target, *(found[key].facts for key in needed)))
    return rows


def _there(found: Mapping[str, Result], key: str) -> bool:
    return key in found and found[key].why is None


def _decode(card: Card) -> Callable[[str, str, Figures], Row]:
    def row(name: str, target: str, speed: Figures) -> Row:
        heat = speed["heats"][0]
        rate = _ours(speed)["decode_tokens_per_second"]["median"]
        share = heat["share_of_bandwidth"]["median"]
        bandwidth = heat["bandwidth_bytes_per_second"]["median"]
        return Row(
            name=name,
            measured=f"{rate:.0f} tok/s, {100 * share:.0f} %",
            floor=f"{bandwidth / speed['bytes_per_step']:.0f} tok/s at {bandwidth / 1e9:.0f} GB/s",
            target=target,
            met=share >= card.share,
        )

    return row


def _exllama(name: str, target: str, speed: Figures) -> Row:
    times = speed["heats"][0]["times_as_fast_as"]["exllamav2"]["decode"]["median"]
    ours = _ours(speed)["decode_tokens_per_second"]["median"]
    return Row(name=name, measured=f"{times:.2f} x ({ours:.0f} tok/s)", target=target, met=times >= 1.5)


def _fixed(name: str, target: str, step: Figures) -> Row:
    parts = step["device_step"]
    return Row(
        name=name,
        measured=f"{1e3 * parts['fixed']:.3f} ms",
        floor=f"{1e3 * parts['empty']:.3f} ms, an empty recorded step",
        target=target,
        met=parts["fixed"] <= 0.25e-3,
        note=f"recorded {1e3 * parts['recorded']:.3f} ms, eager {1e3 * parts['eager']:.3f} ms, "
        f"products {1e3 * parts['products']:.3f} ms",
    )


def _batch(name: str, target: str, one: Figures, eight: Figures) -> Row:
    rates = [_ours(speed)["decode_tokens_per_second"]["median"] / speed["batch"] for speed in (one, eight)]
    share = rates[1] / rates[0]
    return Row(
        name=name,
        measured=f"{100 * share:.0f} % ({rates[1]:.0f} of {rates[0]:.0f} steps/s)",
        target=target,
        met=share >= 0.8,
    )


def _rows64(name: str, target: str, bench: Figures) -> Row:
    chosen = [
        one
        for one in bench["operations"]
        if one["m"] == 64 and one["stored"].startswith("exl2") and not one["name"].startswith("head")
    ]
    ours = sum(one["seconds"]["median"] for one in chosen)
    other = sum(one["torch_seconds"][DEQUANT]["median"] for one in chosen)
    return Row(
        name=name,
        measured=f"{other / ours:.2f} x",
        floor=f"{1e6 * sum(one['floor_seconds'] for one in chosen):.0f} us for {len(chosen)} matrices",
        target=target,
        met=other >= 4 * ours,
        note=f"{1e6 * ours:.0f} us against {1e6 * other:.0f} us",
    )


def _prefill(name: str, target: str, speed: Figures) -> Row:
    times = speed["heats"][0]["times_as_fast_as"]["transformers"]["prefill"]["median"]
    ours = _ours(speed)["prefill_tokens_per_second"]["median"]
    return Row(
        name=name,
        measured=f"{100 * times:.0f} % ({ours:.0f} tok/s)",
        target=target,
        met=times >= 0.8,
        note="the small model",
    )


def _attention(name: str, target: str, bench: Figures) -> Row:
    (one,) = (row for row in bench["operations"] if row["stored"] == "q4" and row["name"].endswith(" 32768"))
    times = 1 / one["share_of_floor"]
    return Row(
        name=name,
        measured=f"{times:.2f} x ({1e6 * one['seconds']['median']:.1f} us)",
        floor=f"{1e6 * one['floor_seconds']:.1f} us",
        target=target,
        met=times <= 1.3,
    )


def _build(card: Card) -> Callable[[str, str, Figures], Row]:
    def row(name: str, target: str, build: Figures) -> Row:
        fast = build["seconds"] < 90
        judged = fast if fast or card.cores <= 8 else False
        met = None if not fast and card.cores < 8 else judged
        note = "" if card.cores == 8 else f"on {card.cores} cores"
        return Row(name=name, measured=f"{build['seconds']:.0f} s", target=target, met=met, note=note)

    return row


def _tests(name: str, target: str, tests: Figures) -> Row:
    return Row(
        name=name,
        measured=f"{tests['passed']} passed, {tests['failed']} failed",
        target=target,
        met=tests["code"] == 0 and tests["failed"] == 0 and tests["passed"] > 0,
    )


def _ours(speed: Figures) -> Figures:
    figures: Figures = speed["heats"][0]["figures"]["exl-runtime"]
    return figures

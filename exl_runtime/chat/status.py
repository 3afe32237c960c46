"""The one-line texts around a reply: what was loaded, what a reply cost, how full the context is. Pure functions."""

from typing import TYPE_CHECKING

from ..console.terminal import clean_line
from ..generation.request import Result
from .turn import Turn

if TYPE_CHECKING:
    from ..runtime import RuntimeInfo

FULL = 0.8  # share of the context from which on a warning is due
GAUGE_CELLS = 8

DEMO_NOTICE = (
    "This is Ember, a toy of 6 million weights that ships with the program: good for trying it out, not for answers. "
    "It remembers names and facts you tell it, knows capitals, opposites and plurals, tells tiny stories and writes "
    "small JSON. It cannot add, count or change case."
)
DEMO_PROMPTS = (
    "What is the capital of France?",
    "My name is Ada and I like tea. What is my name?",
    "What is the opposite of hot?",
    "Tell me a short story about a fox.",
)
DEMO_WAY_OUT = "A real model: exl chat FOLDER, any local folder with an EXL2, GPTQ or safetensors model."
DEMO_LINE = "this is the bundled toy model; a real one: exl chat FOLDER"


def start_line(info: "RuntimeInfo", free: int | None = None) -> str:
    """Model, format and bits per weight, context, cache, backend, memory and load time; `free` bytes of memory left."""
    bits = f"{info.bits_per_weight:.2f} bits per weight"
    attention = getattr(info, "attention", "")
    parts = [
        clean_line(info.name, 80),
        clean_line(f"{info.architecture} {info.format.upper() if info.format != 'dense' else 'dense'}", 80),
        bits,
        f"context {info.context}",
        f"cache {info.cache} {size(info.cache_bytes)}",
        f"{info.backend} on {info.device}" if info.backend != info.device else info.backend,
        *([f"attention {attention}"] if attention else []),
        f"weights {size(info.weight_bytes)}",
        *([] if free is None else [f"{size(free)} free"]),
        f"loaded in {info.load_seconds:.1f} s",
    ]
    return " · ".join(parts)


def status_line(result: Result, context: int) -> str:
    """Prompt, reuse, speeds, and the gauge, for example `prompt 812 tok (640 cached) 1.9k t/s · gen 213 tok 96 t/s`."""
    computed = max(0, result.prompt_tokens - result.reused_tokens)
    cached = f" ({count(result.reused_tokens)} cached)" if result.reused_tokens else ""
    parts = [
        f"prompt {count(result.prompt_tokens)} tok{cached}{rate(computed, result.seconds_prefill)}",
        f"gen {count(result.generated_tokens)} tok{rate(result.generated_tokens - 1, result.seconds_decode)}",
        f"ctx {gauge(min(used(result), context), context)}",
    ]
    if reason := REASONS.get(result.stop_reason):
        parts.append(reason)
    return " · ".join(parts)


REASONS = {
    "length": "stopped at max_tokens (/continue goes on)",
    "cancelled": "stopped by you (/continue goes on)",
    "context": "the context is full",
    "deadline": "out of time",
    "loop": "stopped: it went round in circles",
}


def used(result: Result) -> int:
    """Tokens that prompt and reply had to find room for; more than the context where old ones left meanwhile."""
    return result.prompt_tokens + result.generated_tokens


def gauge(tokens: int, context: int) -> str:
    """`[####----] 1.0k/4k`."""
    share = min(1.0, tokens / context) if context else 1.0
    filled = min(GAUGE_CELLS, round(share * GAUGE_CELLS))
    return f"[{'#' * filled}{'-' * (GAUGE_CELLS - filled)}] {count(tokens)}/{count(context)}"


def fullness_warning(result: Result, context: int, overflow: str) -> str | None:
    """A sentence when the context is nearly full, and what will happen then."""
    share = used(result) / context if context else 1.0
    if share < FULL:
        return None
    then = {
        "error": "a longer conversation will be refused",
        "drop": "the oldest turns will leave",
        "window": "the oldest tokens will leave",
    }[overflow]
    return f"the context is {min(share, 1.0):.0%} full: soon {then} (/clear starts afresh)"


def dropped_notice(turns: tuple[Turn, ...], tokens: int) -> str:
    """Which turns the model no longer sees, by their beginnings."""
    if not turns:
        return f"the context is full: the oldest {count(tokens)} tokens left it"
    said = [turn for turn in turns if turn.role == "user"]
    shown = ", ".join(f"“{excerpt(turn.content)}”" for turn in said[:3])
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    what = "this message and its reply" if len(said) == 1 else f"these {len(said)} messages and their replies"
    return f"the context is full: the model no longer sees {what}: {shown}{more} ({count(tokens)} tokens)"


def excerpt(text: str, limit: int = 40) -> str:
    """The beginning of a text as one line."""
    return clean_line(" ".join(text.split()), limit)


def rate(tokens: int, seconds: float) -> str:
    """` 96 t/s` with a blank in front, or nothing when it would mean nothing."""
    if tokens <= 0 or seconds <= 0:
        return ""
    speed = tokens / seconds
    return f" {speed:.1f} t/s" if speed < 10 else f" {count(round(speed))} t/s"


def count(number: int) -> str:
    """A number in at most four characters or so: 812, 1.9k, 33k, 1.2M."""
    if number < 1000:
        return str(number)
    for unit, divisor in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        scaled = number / divisor
        if scaled < 9.95:
            return f"{scaled:.1f}{unit}".replace(".0", "")
        if scaled < 999.5 or unit == "G":
            return f"{scaled:.0f}{unit}"
    raise AssertionError("unreachable")


def messages(number: int) -> str:
    """`1 message`, `2 messages`."""
    return f"{number} message" + ("" if number == 1 else "s")


def size(number: float) -> str:
    """Bytes in binary units: 3.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")

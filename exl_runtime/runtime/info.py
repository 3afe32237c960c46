"""What was opened, and what it has done since: plain facts about a `Runtime`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What was opened and how. Sizes in bytes, context in tokens, times in seconds."""

    name: str
    path: str
    architecture: str
    format: str  # "exl2", "gptq", "dense", or several joined by "+"
    bits_per_weight: float  # of the decoder layers
    context: int
    cache: str  # type of keys and values: "fp16", "q8", "k6v4" ...
    backend: str  # "cpu", "cuda" or "reference"
    device: str
    weight_bytes: int
    cache_bytes: int
    load_seconds: float
    is_demo: bool
    accuracy: str = "exact"  # or "fast", see `load`
    attention: str = ""  # what attends over prompts: "native", "reference", or on a card "flash", "sdpa" or "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeStats:
    """Counters since the model was opened. Rates are of the time the requests themselves report."""

    requests: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    waiting: int
    running: int
    pages_total: int
    pages_held: int
    pages_idle: int
    weight_bytes: int
    cache_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    drafted_tokens: int = 0  # guessed ahead
    accepted_tokens: int = 0  # ... of which so many came true
    reused_from_host: int = 0  # of the reused tokens: from pages in host memory, and
    reused_from_disk: int = 0  # from snapshots; the others were in the cache itself
    evictions: int = 0  # pages that gave way to others although they held something reusable
    host_cache_bytes: int = 0  # pages in host memory take now

    @property
    def hit_rate(self) -> float:
        """The share of all prompt tokens that did not have to be computed, 0 to 1."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

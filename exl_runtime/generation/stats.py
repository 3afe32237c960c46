"""What a generator counts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStats:
    """Counters over all ended requests, and the present use of the cache in pages, those of all pools together."""

    requests: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    waiting: int
    running: int
    pages_total: int
    pages_held: int
    pages_idle: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    host_tokens: int = 0  # that came back from host memory, and
    disk_tokens: int = 0  # from snapshots
    evictions: int = 0  # pages that were reused although they held something
    host_bytes: int = 0  # of pages in host memory

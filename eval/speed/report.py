"""What a race found: a table for people, the same figures for programs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..tables import Table, left, right
from .race import Heat, Race, Samples
from .spread import Spread, ratios, short, spread
from .traffic import Traffic
from .workload import TURN, Workload

GB = 1e9
PROTOCOL = "medians over runs, least to greatest in brackets; greedy, random prompts, everyone in turn within each run"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Around the figures: the model, what its steps read, memory in bytes, and what the contestants tell."""

    model: str
    device: str
    traffic: Traffic
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int
    base_bytes: int  # before the model was opened
    peak_device_bytes: int | None = None
    details: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def facts_of(race: Race, setup: Setup) -> dict[str, object]:
    """Everything, as one JSON object; rates in tokens per second, times in seconds."""
    load = race.load
    return {
        "model": setup.model,
        "device": setup.device,
        "prompt": load.prompt,
        "turn": TURN,
        "generate": load.generate,
        "batch": load.batch,
        "context_filled": load.decode_from,
        "runs": load.runs,
        "partial": race.partial,
        "bytes_per_step": setup.traffic.step(load.decode_from, load.generate),
        "weight_bytes": setup.weight_bytes,
        "cache_bytes": setup.cache_bytes,
        "peak_resident_bytes": setup.peak_bytes,
        "resident_before_bytes": setup.base_bytes,
        "peak_device_bytes": setup.peak_device_bytes,
        "contestants": {name: dict(told) for name, told in setup.details.items()},
        "heats": [_heat_facts(heat, load, setup.traffic) for heat in race.heats],
    }


def text_of(race: Race, setup: Setup) -> str:
    """Tables, and a last line of JSON."""
    load = race.load
    step = setup.traffic.step(load.decode_from, load.generate)
    lines = [
        f"{setup.model} on {setup.device}: prompt {load.prompt}, {load.generate} tokens generated from a context of "
        f"{load.decode_from}, batch {load.batch}, {load.runs} runs",
        PROTOCOL,
        "",
    ]
    for heat in race.heats:
        lines += [_table(heat, race, setup.traffic).text(), ""]
    lines.append(f"bytes read per step: {step / 1e6:.1f} MB, weights {setup.traffic.weights / 1e6:.1f} MB")
    lines.append(
        f"memory: peak {setup.peak_bytes / 1e6:.0f} MB resident ({setup.base_bytes / 1e6:.0f} MB before the model was "
        f"opened); weights {setup.weight_bytes / 1e6:.0f} MB, cache {setup.cache_bytes / 1e6:.0f} MB"
    )
    if setup.peak_device_bytes is not None:
        lines.append(f"device memory: peak {setup.peak_device_bytes / 1e6:.0f} MB")
    for name, told in setup.details.items():
        lines.append(f"{name}: " + ", ".join(f"{key} {_plain(value)}" for key, value in told.items()))
    if race.partial:
        lines.append("PARTIAL: interrupted; these are the runs that were done by then")
    lines.append(json.dumps(facts_of(race, setup), allow_nan=False))
    return "\n".join(lines)


def figures(samples: Samples, load: Workload) -> dict[str, Spread]:
    """Rates and times of one contestant; what was not measured is left out."""
    found = {
        "prefill_tokens_per_second": [load.batch * load.prompt / t for t in samples.cold],
        "first_token_cold_seconds": samples.cold,
        "first_token_hit_seconds": samples.turn,
        "decode_tokens_per_second": [load.batch * load.generate / t for t in samples.decode],
    }
    return {name: spread(values) for name, values in found.items() if values}


def against(ours: Samples, theirs: Samples) -> dict[str, Spread]:
    """How many times as fast as `theirs`, run by run."""
    pairs = {
        "prefill": ratios(theirs.cold, ours.cold),
        "turn": ratios(theirs.turn, ours.turn),
        "decode": ratios(theirs.decode, ours.decode),
    }
    return {name: found for name, found in pairs.items() if found is not None}


def moved(heat: Heat, samples: Samples, load: Workload, traffic: Traffic) -> tuple[Spread, Spread] | None:
    """(bytes per second that decoding reads, their share of the bandwidth of the same run)."""
    total = traffic.step(load.decode_from, load.generate) * load.generate
    rates = [total / seconds for seconds in samples.decode]
    shares = ratios(rates, heat.bandwidth)
    return None if shares is None else (spread(rates), shares)


def _heat_facts(heat: Heat, load: Workload, traffic: Traffic) -> dict[str, object]:
    first, *peers = heat.samples
    ours = heat.samples[first]
    facts: dict[str, object] = {
        "threads": heat.threads,
        "bandwidth_bytes_per_second": spread(heat.bandwidth).facts() if heat.bandwidth else None,
        "figures": {
            name: {key: value.facts() for key, value in figures(samples, load).items()}
            for name, samples in heat.samples.items()
        },
        "seconds": {
            name: {"cold": samples.cold, "turn": samples.turn, "decode": samples.decode}
            for name, samples in heat.samples.items()
        },
        "times_as_fast_as": {
            name: {key: value.facts() for key, value in against(ours, heat.samples[name]).items()} for name in peers
        },
    }
    if (found := moved(heat, ours, load, traffic)) is not None:
        facts["decode_bytes_per_second"] = found[0].facts()
        facts["share_of_bandwidth"] = found[1].facts()
    return facts


def _table(heat: Heat, race: Race, traffic: Traffic) -> Table:
    first, *peers = heat.samples
    load = race.load
    threads = "" if heat.threads is None else f"{heat.threads} thread{'s' if heat.threads > 1 else ''}"
    columns = [left("measured"), *(right(name) for name in heat.samples), *(right(f"x {name}") for name in peers)]
    table = Table(columns, caption=threads)
    rows = (
        (f"prefill of {load.prompt}, tok/s", "prefill_tokens_per_second", "prefill"),
        ("first token, cold, s", "first_token_cold_seconds", "prefill"),
        (f"first token, {TURN} after a hit, s", "first_token_hit_seconds", "turn"),
        ("decode, tok/s", "decode_tokens_per_second", "decode"),
    )
    of = {name: figures(samples, load) for name, samples in heat.samples.items()}
    times = {name: against(heat.samples[first], heat.samples[name]) for name in peers}
    for title, key, phase in rows:
        cells = [of[name][key].text() if key in of[name] else "-" for name in heat.samples]
        table.add(title, *cells, *(times[name][phase].text() if phase in times[name] else "-" for name in peers))
    blank = ["-"] * (2 * len(peers))
    if (found := moved(heat, heat.samples[first], load, traffic)) is not None:
        gigabytes = Spread(found[0].median / GB, found[0].low / GB, found[0].high / GB, found[0].count)
        percent = Spread(found[1].median * 100, found[1].low * 100, found[1].high * 100, found[1].count)
        table.add("decode reads, GB/s", gigabytes.text(), *blank)
        table.add("of the bandwidth, %", percent.text(), *blank)
    if heat.bandwidth:
        table.add("bandwidth here, GB/s", spread(value / GB for value in heat.bandwidth).text(), *blank)
    return table


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key}: {_plain(one)}" for key, one in value.items()) + ")"
    return short(value) if isinstance(value, float) else str(value)

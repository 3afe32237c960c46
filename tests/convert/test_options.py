"""Options of a job: what is refused, what survives the work folder, what counts as a change."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from convert.options import (
    JobOptions,
    differences,
    from_json,
    load_job,
    spelling,
    to_json,
    validated,
    work_folder,
)
from exl_runtime.console.sizes import parse_size, size_text
from exl_runtime.errors import ConvertError, UsageError

JOB = JobOptions(source=Path("src"), out=Path("out"), bits=4.0)
VRAM = replace(JOB, bits=None, target_vram=12 * 10**9, context=8192, cache="q8")
FULL = replace(
    VRAM,
    head_bits=8,
    work=Path("w"),
    calibration=(Path("a.txt"), Path("b.jsonl")),
    rows=64,
    length=512,
    measurement=Path("m.json"),
    encoder="classic",
    shard_mb=100,
    seed=7,
    device="cuda:1",
    threads=3,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("12G", 12 * 2**30),
        ("11.5G", 23 * 2**29),
        ("8000MB", 8 * 10**9),
        (" 0.5 gib ", 2**29),
        ("100K", 102400),
        ("1.1TB", 1_100_000_000_000),  # as a float, 1.1 is a little more
        (".25M", 2**18),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "12", "GB", "-1GB", "1e9B", "12 GBs", "1,5GB", "12Gi", "12i", "nan GB", "\uff11\uff12GB"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_sizes_are_shown_in_the_unit_they_came_in() -> None:
    assert size_text(12 * 10**9) == "12.00 GB" and size_text(12 * 2**30) == "12.00 GiB"
    assert size_text(3 * 10**9 + 1, like=2**30) == "2.79 GiB" and size_text(2**20, like=10**9) == "1.0 MB"


@pytest.mark.parametrize("options", [JOB, VRAM, FULL, replace(VRAM, context=None, cache="fp16")])
def test_what_can_be(options: JobOptions) -> None:
    made = validated(options)
    assert made.source == Path.cwd() / "src" and made.out == Path.cwd() / "out"
    assert validated(made) == made
    assert replace(made, source=options.source, out=options.out) == replace(
        options,
        work=options.work and Path.cwd() / options.work,
        measurement=options.measurement and Path.cwd() / options.measurement,
        calibration=tuple(Path.cwd() / path for path in options.calibration),
    )


def test_measuring_needs_neither_bits_nor_a_folder() -> None:
    only = JobOptions(source=Path("src"), work=Path("w"), measure_only=True)
    assert validated(only).bits is None
    assert validated(replace(only, work=None, out=Path("out"))).out is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": None}, "how many bits"),
        ({"target_vram": 10**9}, "exclude each other"),
        ({"bits": 0.0}, "--bits 0.0"),
        ({"bits": -4.0}, "--bits -4.0"),
        ({"bits": float("nan")}, "--bits nan"),
        ({"bits": float("inf")}, "--bits inf"),
        ({"out": None}, "folder for the result"),
        ({"head_bits": 7}, "--head-bits 7"),
        ({"rows": 3}, "--rows 3: wanted 4"),
        ({"length": 31}, "--length 31: wanted 32 to 65536"),
        ({"length": 65537}, "--length 65537"),
        ({"context": 8192}, "--context is only used"),
        ({"cache": "q4"}, "--cache is only used"),
        ({"cache": "q5", "bits": None, "target_vram": 1}, "--cache 'q5': no such type"),
        ({"context": 0, "bits": None, "target_vram": 1}, "--context 0"),
        ({"bits": None, "target_vram": 0}, "no memory at all"),
        ({"encoder": "good"}, "--encoder 'good': not one of best, classic"),
        ({"shard_mb": -1}, "--shard-size -1"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed"),
        ({"threads": 0}, "--threads 0"),
        ({"device": "tpu\x1b"}, "--device"),
        ({"measure_only": True, "measurement": Path("m.json")}, "--measure-only makes"),
        ({"measure_only": True, "out": None}, "nowhere to work in"),
        ({"out": Path("src")}, "--out and --in are the same folder"),
        ({"out": Path("src/../src/x")}, "is inside --in"),
        ({"work": Path("src/w")}, "is inside --in"),
        ({"work": Path("out")}, "--work and --out are the same"),
        ({"work": Path("out/w")}, "is inside --out"),
        ({"out": Path("w/out"), "work": Path("w")}, "--out w/out is inside --work|is inside --work"),
        ({"work": Path("out.partial")}, "written into a folder of this name"),
        ({"out": Path("/")}, "nowhere to work in"),
        ({"out": Path("a\0b")}, "not a path"),
    ],
)
def test_what_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        validated(replace(JOB, **changes))
    assert "\n" not in caught.value.problem and "\x1b" not in caught.value.problem


def test_links_do_not_hide_the_source(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "link").symlink_to("src")
    with pytest.raises(UsageError, match="same folder"):
        validated(replace(JOB, source=tmp_path / "src", out=tmp_path / "link"))


def test_the_work_folder() -> None:
    assert work_folder(JOB) == Path("out.work") and work_folder(FULL) == Path("w")
    assert work_folder(replace(JOB, out=Path("a/model-4.0bpw"))) == Path("a/model-4.0bpw.work")
    parent = validated(replace(JOB, source=Path("/somewhere"), out=Path("../x/..")))
    assert work_folder(parent) == Path.cwd().parent.with_name(Path.cwd().parent.name + ".work")


@pytest.mark.parametrize("options", [JOB, VRAM, FULL])
def test_json_and_back(options: JobOptions, tmp_path: Path) -> None:
    value = to_json(options)
    assert value["source"] == str(Path.cwd() / "src") and value["shard_mb"] == options.shard_mb
    again = from_json(json.loads(json.dumps(value)))
    assert again == validated(options) and type(again.bits) is type(options.bits)
    assert load_job_of(tmp_path, {"options": value}) == again


def load_job_of(folder: Path, content: object) -> JobOptions:
    (folder / "job.json").write_text(json.dumps(content))
    return load_job(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": "4"},
        {"bits": True},
        {"head_bits": 6.0},
        {"head_bits": None},
        {"source": None},
        {"source": 3},
        {"out": ["x"]},
        {"calibration": "a.txt"},
        {"calibration": [1]},
        {"measure_only": 1},
        {"cache": None},
        {"colour": "blue"},
    ],
)
def test_damaged_jobs(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"job\.json"):
        load_job_of(tmp_path, {"options": {**to_json(JOB), **changes}})


def test_no_job(tmp_path: Path) -> None:
    for content in ({}, {"options": 3}, {"options": {"source": "x"}}):
        with pytest.raises(ConvertError, match="not the options of a job"):
            load_job_of(tmp_path, content)
    with pytest.raises(ConvertError, match="no job was started"):
        load_job(tmp_path / "elsewhere")


def test_an_integer_in_job_json_is_the_same_bits() -> None:
    assert differences(from_json({**to_json(JOB), "bits": 4}), JOB) == []


def test_differences_in_words() -> None:
    assert differences(JOB, validated(JOB)) == []
    assert differences(JOB, replace(JOB, bits=3.5)) == ["bits: 4.0 when the job started, 3.5 now"]
    assert differences(JOB, VRAM) == [
        "bits: 4.0 when the job started, not given now",
        "target-vram: not given when the job started, 12.00 GB (12000000000 bytes) now",
        "context: not given when the job started, 8192 now",
        "cache: fp16 when the job started, q8 now",
    ]
    (line,) = differences(JOB, replace(JOB, calibration=(Path("/x/a.txt"), Path("/x/b.txt"))))
    assert line == "calibration: not given when the job started, /x/a.txt, /x/b.txt now"


def test_every_option_counts_or_is_known_not_to() -> None:
    other = {
        **{name: Path("other") for name in ("source", "out", "work", "measurement")},
        **dict.fromkeys(("head_bits", "rows", "length", "target_vram", "context", "shard_mb", "seed", "threads"), 99),
        "bits": 9.0,
        "calibration": (Path("other"),),
        "measure_only": True,
        "cache": "bf16",
        "encoder": "other",
        "device": "other",
    }
    counted = {
        field.name
        for field in fields(JobOptions)
        if differences(FULL, replace(FULL, **{field.name: other[field.name]}))
    }
    assert {field.name for field in fields(JobOptions)} - counted == {
        "out",
        "work",
        "measure_only",
        "device",
        "threads",
    }
    assert spelling("source") == "in" and spelling("shard_mb") == "shard-size" and spelling("head_bits") == "head-bits"


def test_options_are_torch_free(repo: Path) -> None:
    script = "import sys, convert.options, convert.cli; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=repo).returncode == 0

"""What is run on a card, stage by stage: command lines, nothing else. A stage that fails leaves the others alone."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable
LONG, SHORT = 2048, 128  # tokens of prompts
SANITIZED = ("test_ptx.py", "test_skinny.py", "test_gemm.py", "test_repack.py", "test_rows.py", "test_kv_append.py")
BUILD = """
import os, tempfile
with tempfile.TemporaryDirectory() as cold:
    os.environ["EXL_CACHE_DIR"] = cold
    from exl_runtime.ops import native
    native.ensure_cuda()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One process.

    gives     "facts": the last line of its output is the JSON of `--json`; "tests": pytest; "time": only how long
    needs     the stages whose work it reads
    program   that has to be on PATH
    """

    name: str
    command: tuple[str, ...]
    gives: str = "facts"
    needs: tuple[str, ...] = ()
    program: str | None = None


def stages(out: Path, *, device: str, large: str, small: str, tests: Path | None) -> list[Stage]:
    """All of them, in order.

    out           models and figures go below it
    large, small  shapes as `eval make` takes them
    tests         the folder of the tests; None: they are not here
    """
    models = out / "models"
    folder = {name: str(models / name) for name in ("small", "small-fp16", "large")}

    def make(name: str, shape: str, *more: str) -> Stage:
        return Stage(name=f"make-{name}", command=evaluate("make", shape, "-o", folder[name], *more))

    def speed(name: str, model: str, *more: str, needs: Sequence[str] = ()) -> Stage:
        command = evaluate("speed", folder[model], "--device", device, *more)
        return Stage(name=name, command=command, needs=(f"make-{model}", *needs))

    def step(model: str) -> Stage:
        command = evaluate("step", folder[model], "--device", device, "--prompt", "64", "--generate", "64")
        return Stage(name=f"step-{model}", command=command, needs=(f"make-{model}",))

    def kernels(name: str, *more: str) -> Stage:
        return Stage(name=name, command=evaluate("kernels", "--shapes", large, "--device", device, *more))

    found = [Stage(name="build", command=(PYTHON, "-c", BUILD), gives="time")]
    if tests is not None:
        found.append(Stage(name="tests", command=pytest(str(tests)), gives="tests"))
    found += [
        make("small", small, "--format", "exl2", "--bits", "4"),
        step("small"),
        speed("speed-small", "small", "--prompt", str(SHORT)),
        speed("speed-small-exllamav2", "small", "--prompt", str(SHORT), "--peer", f"exllamav2={folder['small']}"),
        make("small-fp16", small, "--format", "fp16"),
        speed(
            "prefill",
            "small",
            *("--prompt", str(LONG), "--generate", "16", "--peer", f"transformers={folder['small-fp16']}"),
            needs=("make-small-fp16",),
        ),
        make("large", large, "--format", "exl2", "--bits", "4"),
        step("large"),
        speed("speed-large", "large", "--prompt", str(SHORT)),
        speed("speed-large-8", "large", "--prompt", str(SHORT), "--batch", "8"),
        kernels("kernels", "--ops", "linear", "--format", "exl2,gptq,dense", "--m", "1,2,4,8,16,32,64,256"),
        kernels("attention", "--ops", "attention", "--contexts", "2048,32768", "--caches", "fp16,q8,q4"),
    ]
    if tests is not None:
        checked = [str(tests / "cuda" / name) for name in SANITIZED]
        tool = ("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "application-only")
        found.append(
            Stage(name="sanitizer", command=(*tool, *pytest(*checked)), gives="tests", program="compute-sanitizer")
        )
    return found


def evaluate(*arguments: str) -> tuple[str, ...]:
    """A command of `python -m eval` that gives JSON."""
    return (PYTHON, "-m", "eval", *arguments, "--json")


def pytest(*paths: str) -> tuple[str, ...]:
    """The tests that need a card."""
    return (PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths)

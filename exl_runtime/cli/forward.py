"""`exl convert|eval|bench`: the same as `python -m convert` and `python -m eval`, which own their arguments."""

import runpy
import sys

# command -> (package, arguments put before the user's, one line of help)
PROGRAMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "convert": ("convert", (), "make an EXL2 model out of an fp16, bf16, GPTQ or EXL2 one"),
    "eval": ("eval", (), "measure what a model is worth: perplexity, divergence, tasks, comparisons"),
    "bench": ("eval", ("speed",), "measure speed"),
}


def run(command: str, arguments: list[str]) -> int:
    """Run the package as a program in this process; its exit code is ours."""
    package, first, _ = PROGRAMS[command]
    before = sys.argv
    sys.argv = [f"exl {command}", *first, *arguments]
    try:
        runpy.run_module(package, run_name="__main__", alter_sys=False)
    except SystemExit as err:
        if err.code is None or isinstance(err.code, int):
            return err.code or 0
        sys.stderr.write(f"{err.code}\n")
        return 1
    finally:
        sys.argv = before
    return 0

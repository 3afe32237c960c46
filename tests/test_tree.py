"""The house rules that a machine can check: import directions, file size, family names, links, lint."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("exl_runtime", "ext", "convert", "eval")
WALL = 400

# What a room may import, by room. A name stands for the whole room; "torch" and other libraries are not listed here.
LAW: dict[str, set[str]] = {
    "errors": set(),
    "memory": set(),
    "console": {"errors"},
    "files": {"config", "errors"},
    "texts": {"config", "tokenizer", "errors"},
    "config": {"errors"},
    "checkpoint": {"config", "files", "memory", "errors"},
    "formats": {"errors"},
    "ops": {"formats", "ext", "memory", "errors"},
    "cache": {"config", "ops", "errors"},
    "model": {"config", "checkpoint", "formats", "ops", "cache", "errors"},
    "tokenizer": {"errors"},
    "sampling": {"ops", "errors"},
    "generation": {"model", "cache", "sampling", "tokenizer", "config", "errors"},
    "runtime": {
        "generation",
        "model",
        "cache",
        "sampling",
        "tokenizer",
        "checkpoint",
        "config",
        "formats",
        "ops",
        "errors",
    },
    "chat": {"console", "runtime", "generation", "cache", "sampling", "tokenizer", "model", "errors"},
    "server": {"console", "runtime", "generation", "sampling", "tokenizer", "errors"},
    "cli": {
        "console",
        "runtime",
        "chat",
        "server",
        "generation",
        "cache",
        "sampling",
        "tokenizer",
        "model",
        "ops",
        "errors",
    },
    "ext": {"errors"},
    "convert": {"console", "files", "texts", "config", "checkpoint", "formats", "ops", "model", "tokenizer", "errors"},
    "eval": {
        "console",
        "files",
        "texts",
        "runtime",
        "generation",
        "sampling",
        "cache",
        "config",
        "checkpoint",
        "formats",
        "ops",
        "model",
        "tokenizer",
        "memory",
        "errors",
    },
}
LATE = {"runtime": {"chat"}}  # allowed inside a function only: rt.chat() hands out what lies above it
TORCH_FREE = {"errors", "config", "console", "files", "texts", "tokenizer", "cli"}  # at import time
OF_A_PROGRAM = "eval/speed/peers/llamacpp.py"  # calls the functions of a program by their names
FAMILIES = re.compile(r"\b(llama(?!3\b|[-_.]?cpp)|gemma|qwen|mistral|mixtral|phi-?3)", re.IGNORECASE)


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\n") if name.endswith(suffixes) and (ROOT / name).is_file()]


def room_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "exl_runtime":
        return None if len(parts) < 2 or parts[1].startswith("__") else parts[1]
    return parts[0] if parts[0] in PACKAGES else None


def imports_of(path: Path) -> list[tuple[str, bool, int]]:
    """(module, at the top level of the file, line) of every import; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    } | type_only
    for node in ast.walk(tree):
        top = id(node) not in late
        if isinstance(node, ast.Import):
            found += [(alias.name, top, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found.append((module, top, node.lineno))
            found += [(f"{module}.{alias.name}", top, node.lineno) for alias in node.names]
    return found


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "exl_runtime":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in PACKAGES else None


def python_files() -> list[Path]:
    return [path for path in tracked(".py") if room_of(path)]


def test_imports_follow_the_law() -> None:
    broken = []
    known = {child.stem for child in (ROOT / "exl_runtime").iterdir()} | set(PACKAGES)
    for path in python_files():
        room = room_of(path)
        assert room in LAW, f"{path.relative_to(ROOT)}: room {room!r} is not in the law"
        for module, top, line in imports_of(path):
            target = room_of_module(module)
            if target is None or target == room or target not in known or target.startswith("__"):
                continue
            if target not in LAW[room] and (top or target not in LATE.get(room, set())):
                broken.append(f"{path.relative_to(ROOT)}:{line}: {room} must not import {target}")
    assert not broken, "\n".join(sorted(set(broken)))


def test_only_one_file_imports_the_extension() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in python_files()
        if room_of(path) != "ext" and any(room_of_module(module) == "ext" for module, _, _ in imports_of(path))
    }
    assert users <= {"exl_runtime/ops/native.py"}, users


def test_rooms_without_torch() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files()
        if room_of(path) in TORCH_FREE
        for module, top, line in imports_of(path)
        if module.split(".")[0] == "torch" and (top or room_of(path) != "cli")
    ]
    assert not found, found


def test_examples_use_public_names_only() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        inner = [module for module, _, _ in imports_of(path) if re.match(r"exl_runtime\.[a-z]+\.", module)]
        assert not inner, f"{path.name} reaches into {inner}"
        assert len(path.read_text().splitlines()) < 60, f"{path.name} is 60 lines or longer"


def test_no_file_over_the_wall() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): count
        for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > WALL
    }
    assert not long, f"split by concept: {long}"


def test_families_are_named_in_config_only() -> None:
    found = []
    for path in tracked(".py", ".cpp", ".h", ".cu", ".cuh"):
        if room_of(path) in (None, "config") or path == ROOT / OF_A_PROGRAM:
            continue
        text = path.read_text(encoding="utf-8")
        code = strip_prose(text) if path.suffix == ".py" else re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FAMILIES.finditer(code)]
    assert not found, "\n".join(found)


def strip_prose(source: str) -> str:
    """Code without comments and docstrings: prose may compare with families, code may not branch on them."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.unparse(tree)


def test_forbidden_build_flags() -> None:
    flags = re.compile(r"[\"']-(Ofast|ffast-math|march=native)")
    found = [str(path) for path in tracked(".py", ".toml", ".txt") if flags.search(path.read_text(encoding="utf-8"))]
    assert not [name for name in found if not name.endswith("test_tree.py")], found


def test_no_machine_paths() -> None:
    paths = re.compile(r"(?<![\w.])/(work|root|home/\w+)/")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked(".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".json", "run")
        if path.name != "test_tree.py"
        for match in paths.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, found


def test_help_needs_no_torch() -> None:
    script = "import sys; import exl_runtime, exl_runtime.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_links_in_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked(".md"):
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not broken, broken


def test_lint_is_clean() -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([ruff, *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:]

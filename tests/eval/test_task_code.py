"""Code of a model: what passes, and what time, memory, output, network, files and processes it can have."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from eval.tasks import sandbox
from eval.tasks.sandbox import CONFINED, Limits, isolation, run_code

QUICK = Limits(seconds=20, memory=400 * 2**20, output=2**16)


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "hooks"])
def test_right_code_passes_and_wrong_code_fails(namespaces) -> None:
    right = run_code("def f(x):\n    return x + 1", "assert f(1) == 2", QUICK, namespaces=namespaces)
    assert right.passed and right.reason == "passed"
    wrong = run_code("def f(x):\n    return x", "assert f(1) == 2, 'off by one'", QUICK, namespaces=namespaces)
    assert not wrong.passed and wrong.reason == "AssertionError: off by one"
    assert wrong.namespaces == (namespaces and isolation())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(0)", "ended before its tests were done"),
        ("import os; os._exit(0)", "ended before its tests were done"),
        ("raise SystemExit('over')", "over"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError"),
        ("x = [0] * 10**9", "out of memory"),
        ("while True:\n    print('y' * 1000)", "too much output"),
        ("open('big', 'wb').write(bytes(10**6))", "File too large"),
        ("import ctypes; ctypes.CDLL(None)", "not allowed"),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "not allowed"),
    ],
)
def test_what_does_not_pass_says_why(code, reason) -> None:
    verdict = run_code(code, "", QUICK)
    assert not verdict.passed and reason in verdict.reason


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited_and_nothing_stays_behind(code, monkeypatch) -> None:
    groups = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            groups.append(self.pid)

    monkeypatch.setattr(sandbox.subprocess, "Popen", Recorded)
    started = time.monotonic()
    verdict = run_code(code, "", Limits(seconds=1.0))
    assert (verdict.passed, verdict.reason) == (False, "out of time")
    assert time.monotonic() - started < 15
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # a killed child stays in its group until init has reaped it
            os.killpg(groups[0], 0)
            time.sleep(0.05)


def test_its_folder_is_its_own_and_goes_away() -> None:
    code = "import os\nopen('ok', 'w').write('x')\nos.remove('ok')\nassert os.listdir('.') in ([], ['output'])"
    before = set(Path(sandbox.tempfile.gettempdir()).glob("exl-eval-*"))
    assert run_code(code, "", QUICK).passed
    assert set(Path(sandbox.tempfile.gettempdir()).glob("exl-eval-*")) <= before


def test_the_environment_does_not_reach_it(monkeypatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    assert run_code("import os\nassert 'API_KEY' not in os.environ", "", QUICK).passed


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "hooks"])
def test_hooks_refuse_network_processes_and_files(tmp_path, listening, namespaces) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    for code in (
        f"import socket; socket.create_connection(('127.0.0.1', {listening}))",
        f"import _socket; _socket.socket().connect(('127.0.0.1', {listening}))",
        "import os; os.fork()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        f"open({str(target)!r}, 'w')",
        f"import os; os.open({str(target)!r}, os.O_WRONLY)",
        f"import os; os.remove({str(target)!r})",
        f"import os; open('x', 'w'); os.rename('x', {str(target)!r})",
        "import os; os.kill(os.getppid(), 9)",
    ):
        verdict = run_code(code, "", QUICK, namespaces=namespaces)
        assert not verdict.passed, code
        assert "not allowed" in verdict.reason or "cannot be" in verdict.reason, (code, verdict)
    assert target.read_text() == "kept"


def test_namespaces_hold_without_any_hook(tmp_path, listening) -> None:
    """The walls of the kernel by themselves: the functions of confined.py, and no hook behind them."""
    if not isolation():
        pytest.skip("the kernel gives this user no namespaces")
    (tmp_path / "kept").write_text("kept")
    own = tmp_path / "own"
    own.mkdir()
    script = f"""
        import os, runpy, socket
        confined = runpy.run_path({str(CONFINED)!r}, run_name="confined")
        assert confined["enter_namespaces"]({str(own)!r}, 2**20)
        assert os.getpid() == 1
        try:
            socket.create_connection(("127.0.0.1", {listening}), timeout=5)
        except OSError as err:
            assert "unreachable" in str(err), err
        else:
            raise AssertionError("connected")
        try:
            open({str(tmp_path / "kept")!r}, "w")
        except OSError as err:
            assert "Read-only" in str(err), err
        else:
            raise AssertionError("opened")
        open("fine", "w").write("x")
        print("held")
    """
    ran = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(script)], cwd=own, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "held\n", ran.stderr
    assert (tmp_path / "kept").read_text() == "kept" and not list(own.iterdir())


def test_limits_cannot_be_passed_by_ignoring_the_signal() -> None:
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_code(code, "", Limits(seconds=1.0)).reason == "out of time"

"""`exl serve` as a process: it says where it is, answers, and ends in good order on a signal."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from exl_runtime.cli.main import build_parser, main
from exl_runtime.cli.serve import api_key, ready_line
from exl_runtime.errors import UsageError

pytest.importorskip("uvicorn")


@contextmanager
def command(repo, *options, **variables):
    """(process, port) of a server with the demo model."""
    call = [sys.executable, "-m", "exl_runtime", "serve", "demo", "--port", "0", "--context", "512", *options]
    with subprocess.Popen(
        call, cwd=repo, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
    ) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"at http://127\.0\.0\.1:(\d+)/v1", line):
                    break
            else:
                pytest.fail("it did not start")
            yield process, int(found[1])
        finally:
            process.kill()


def request(port, path, body=None, **headers):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
    return link.getresponse()


ASK = {"messages": [{"role": "user", "content": "What is the capital of Norway?"}], "temperature": 0}


def test_it_serves_and_ctrl_c_ends_it(repo) -> None:
    with command(repo, "--name", "mine", "--max-tokens", "5", EXL_API_KEY="k") as (process, port):
        assert request(port, "/v1/models").status == 401
        answer = json.loads(
            request(port, "/v1/chat/completions", ASK | {"model": "mine"}, authorization="Bearer k").read()
        )
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        log = process.stderr.read()
    assert "POST /v1/chat/completions 200" in log and "stopped" in log
    assert "Norway" not in log and "Traceback" not in log


def test_sigterm_cuts_long_replies(repo) -> None:
    with command(repo, "--grace", "1", "--quiet") as (process, port):
        body = ASK | {"stream": True, "max_tokens": 100_000, "overflow": "window", "ignore_eos": True}
        answer = request(port, "/v1/chat/completions", body)
        assert answer.readline().startswith(b"data:")
        process.send_signal(signal.SIGTERM)
        assert answer.read().rstrip().endswith(b"data: [DONE]")
        assert process.wait(30) == 0
        log = process.stderr.read()
    assert "Traceback" not in log and "POST" not in log and "stopped" in log


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="is in use"):
        main(["serve", "demo", "--port", str(taken.getsockname()[1])])
    with pytest.raises(UsageError, match="no address"):
        main(["serve", "demo", "--host", "no.such.name.invalid"])


def test_without_the_extra_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("exl_runtime.server.run.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"(?s)needs starlette and uvicorn.*exl-runtime\[server\]"):
        main(["serve", "demo"])


@pytest.mark.parametrize(
    "words", [["--port", "70000"], ["--api-key", ""], ["--api-key", "a b"], ["--temperature", "-1"]]
)
def test_wrong_options(words) -> None:
    with pytest.raises(UsageError):
        main(["serve", "demo", *words])


def test_the_key_may_come_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("EXL_API_KEY", "from-outside")
    assert api_key(build_parser().parse_args(["serve"])) == "from-outside"
    assert api_key(build_parser().parse_args(["serve", "--api-key", "given"])) == "given"
    monkeypatch.delenv("EXL_API_KEY")
    assert api_key(build_parser().parse_args(["serve"])) is None


def test_the_line_for_the_user() -> None:
    assert ready_line("m", "::1", 80, 4096) == "m, context 4096 tokens, at http://[::1]:80/v1 (Ctrl-C stops)"

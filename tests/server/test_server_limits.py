"""Who may come in, and how much: key, origin, host, sizes, the queue; the small endpoints; the access log."""

import http.client
import json
import socket

import pytest
from serving import Scripted, served, wait_for

import exl_runtime as exl

pytest.importorskip("uvicorn")
ASK = {"model": "demo", "messages": [{"role": "user", "content": "a secret thing"}]}


@pytest.fixture(scope="module")
def real():
    with exl.load("demo", context=512) as opened:
        yield opened


def call(serving, path, body=None, *, method=None, headers=None):
    """(status, parsed answer, headers)"""
    link = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
    data = json.dumps(body) if isinstance(body, dict) else body
    link.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
    answer = link.getresponse()
    text = answer.read()
    link.close()
    return answer.status, json.loads(text) if text else None, answer.headers


def test_the_key(real) -> None:
    with served(Scripted(real, "hi"), api_key="s3cret") as serving:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
        ):
            status, answer, _ = call(serving, "/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), headers
            assert "s3cret" not in str(answer)
        assert call(serving, "/v1/chat/completions", ASK)[0] == 401
        assert call(serving, "/v1/models", headers={"authorization": "Bearer s3cret"})[0] == 200
        assert call(serving, "/health")[0] == 200, "monitors know no key"


def test_web_pages_are_kept_out_unless_allowed(real) -> None:
    page = {"origin": "http://evil.example"}
    with served(Scripted(real, "hi")) as serving:
        assert call(serving, "/v1/chat/completions", ASK, headers=page)[1]["error"]["code"] == "origin_not_allowed"
        assert call(serving, "/v1/models", headers={"host": "evil.example:8000"})[0] == 403
        status, _, headers = call(serving, "/v1/models")
        assert status == 200 and "access-control-allow-origin" not in headers
        assert call(serving, "/v1/models", headers={"host": "localhost:1"})[0] == 200
    with served(Scripted(real, "hi"), origins=("http://app.example",), api_key="k") as serving:
        friend = {"origin": "http://app.example"}
        wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        status, headers = preflight(serving, {**friend, **wanted})
        assert status == 200 and headers["access-control-allow-origin"] == "http://app.example"
        status, _, headers = call(serving, "/v1/models", headers={**friend, "authorization": "Bearer k"})
        assert status == 200 and headers["access-control-allow-origin"] == "http://app.example"
        assert call(serving, "/v1/models", headers={**page, "authorization": "Bearer k"})[0] == 403


def preflight(serving, headers):
    """What a browser asks before it lets a page send a key: (status, headers)"""
    link = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
    link.request("OPTIONS", "/v1/chat/completions", headers=headers)
    answer = link.getresponse()
    answer.read()
    return answer.status, answer.headers


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 400, "not valid JSON"),
        ("[]", 400, "must be a JSON object"),
        ('{"a": NaN}', 400, "NaN is not a JSON number"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", 400, "nested more than 64"),
        ('{"a": ' + "[" * 9000, 400, "nested more than 64"),
        ("1" * 5000, 400, "not valid JSON"),
        (b"\xff\xfe{", 400, "not valid JSON"),
        ('{"a": "' + "x" * 20_000 + '"}', 413, "larger than 10000 bytes"),
        ("{}", 400, "messages is empty"),
        ('{"messages": 3}', 400, "messages must be a list"),
        ('{"messages": [3]}', 400, "must be an object"),
    ],
)
def test_bodies(real, body, status, said) -> None:
    with served(Scripted(real, "hi"), max_body=10_000) as serving:
        found, answer, _ = call(serving, "/v1/chat/completions", body)
        assert found == status and said in answer["error"]["message"]


def test_a_body_without_a_length_is_limited_too(real) -> None:
    with served(Scripted(real, "hi"), max_body=10_000) as serving:
        link = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
        link.request(
            "POST",
            "/v1/completions",
            iter([b"x" * 4000] * 3),
            encode_chunked=True,
            headers={"transfer-encoding": "chunked"},
        )
        assert link.getresponse().status == 413


def test_a_client_that_leaves_amid_its_body_is_no_failure(real, caplog) -> None:
    with served(Scripted(real, "hi")) as serving:
        with socket.create_connection(("127.0.0.1", serving.port)) as link:
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
            wait_for(lambda: serving.server.server_state.connections)
        wait_for(lambda: any(" 499 " in line for line in serving.lines))
        assert not caplog.records and serving.desk.pending == 0


def test_headers_are_limited(real) -> None:
    with served(Scripted(real, "hi")) as serving, socket.create_connection(("127.0.0.1", serving.port)) as link:
        link.settimeout(20)
        link.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000)
        assert link.recv(100).split()[1] in (b"400", b"431")


def test_nothing_else_is_served(real) -> None:
    with served(Scripted(real, "hi")) as serving:
        for path in ("/", "/etc/passwd", "/../../etc/passwd", "/v1", "/v1/models/../../x", "/docs"):
            status, answer, _ = call(serving, path)
            assert status == 404 and answer["error"]["type"] == "invalid_request_error", path
        status, answer, _ = call(serving, "/v1/chat/completions")
        assert status == 405 and "wrong method" in answer["error"]["message"]


def test_a_full_queue_is_429_and_leaving_empties_it(real) -> None:
    runtime = Scripted(real, "x" * 2000)
    runtime.pause = 0.05
    with served(runtime, parallel=1, queue=1) as serving:
        links = []
        for waiting in (1, 2):
            link = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
            link.request("POST", "/v1/chat/completions", json.dumps(ASK))
            links.append(link)
            wait_for(lambda n=waiting: serving.desk.pending == n)
        assert len(runtime.seen) == 1, "the second waits"
        status, answer, headers = call(serving, "/v1/chat/completions", ASK)
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (429, "queue_full", "rate_limit_error")
        assert headers["retry-after"]
        assert call(serving, "/v1/chat/completions", ASK | {"n": 3})[0] == 400, "more than could ever wait"
        for left, link in ((1, links[1]), (0, links[0])):  # who waits need not wait for that
            link.close()
            wait_for(lambda n=left: serving.desk.pending == n, 3)
        assert len(runtime.seen) == 1, "what waited never started"
        runtime.pause, runtime.replies = 0, ["fine"]
        assert call(serving, "/v1/chat/completions", ASK)[0] == 200


def test_a_quiet_stream_is_kept_alive(real) -> None:
    runtime = Scripted(real, "abcdefghij")
    runtime.pause = 0.4
    with served(runtime, keep_alive=0.1) as serving:
        link = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
        link.request("POST", "/v1/chat/completions", json.dumps(ASK | {"stream": True}))
        answer = link.getresponse()
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
        assert ": waiting" in events and events[-2:] == ["data: [DONE]", ""]


def test_tokens_and_back(real) -> None:
    with served(real, aliases=frozenset({"*"})) as serving:
        text = "Hello there, 世界"
        status, answer, _ = call(
            serving, "/tokenize", {"model": "anything", "prompt": text, "add_special_tokens": False}
        )
        assert status == 200 and answer["tokens"] == real.tokenizer.encode(text) and answer["max_model_len"] == 512
        assert answer["count"] == len(answer["tokens"])
        assert call(serving, "/detokenize", {"tokens": answer["tokens"]})[1]["prompt"] == text
        answer = call(serving, "/tokenize", {"messages": ASK["messages"], "return_token_strs": True})[1]
        assert answer["tokens"] == list(real.render(ASK["messages"]).ids)
        assert answer["token_strs"][0] == real.tokenizer.piece(answer["tokens"][0])
        for path, wrong in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": ASK["messages"]}),
            ("/detokenize", {"tokens": ["a"]}),
            ("/detokenize", {"tokens": [-1]}),
        ):
            assert call(serving, path, wrong)[0] == 400, wrong


def test_health_and_the_log(real) -> None:
    with served(Scripted(real, "hi")) as serving:
        assert call(serving, "/health")[1] == {"status": "ok", "model": "demo", "pending": 0}
        call(serving, "/v1/chat/completions", ASK)
        call(serving, "/v1/x%1b%0aforged?prompt=secret")
        wait_for(lambda: len(serving.lines) == 3)  # a line is written after the answer
        log = "\n".join(serving.lines)
        assert "POST /v1/chat/completions 200" in log and "tokens in (0 cached), 1 out" in log
        assert "secret" not in log and "\x1b" not in log

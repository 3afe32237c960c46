"""The example of a chat in the browser: its page, and what the page asks for."""

import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest


def test_the_page_and_its_replies(repo) -> None:
    call = [sys.executable, "-u", "examples/web_chat.py", "demo", "0"]
    with subprocess.Popen(call, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            root = re.search(r"http://\S+", process.stdout.readline()).group()
            with urllib.request.urlopen(root, timeout=60) as page:
                assert b'fetch("/chat"' in page.read()
            body = b'[{"role": "user", "content": "What is the capital of Norway?"}]'
            with urllib.request.urlopen(
                urllib.request.Request(f"{root}/chat", body, {"Origin": root}), timeout=60
            ) as answer:
                assert answer.read().decode().strip()
            for origin in ({}, {"Origin": "http://evil.example"}):
                with pytest.raises(urllib.error.HTTPError, match="403"):
                    urllib.request.urlopen(urllib.request.Request(f"{root}/chat", body, origin), timeout=60)
        finally:
            process.kill()

"""`chat_template_kwargs` of requests, and the values a server has for those that do not say."""

import pytest
from serving import Scripted, served

import exl_runtime as exl
from exl_runtime.tokenizer.template import ChatTemplate

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
SOURCE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}[{{ mood }}|{{ reasoning_effort }}]"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def real():
    with exl.load("demo", threads=1, context=512) as runtime:
        yield runtime


@pytest.fixture
def asked(real):
    runtime = Scripted(real, "Hello.", template=ChatTemplate.from_text(SOURCE, real.tokenizer))
    with served(runtime, template_args={"mood": "kind", "reasoning_effort": "low"}) as server:
        client = openai.OpenAI(base_url=f"{server.root}/v1", api_key="none", max_retries=0)

        def ask(**options):
            client.chat.completions.create(model="demo", messages=ASK, **options)
            return runtime

        yield ask


def test_a_request_wins_over_the_server(asked) -> None:
    assert asked().rendered == "<user>Hi[kind|low]<assistant>"
    said = {"chat_template_kwargs": {"mood": "sad"}}
    assert asked(extra_body=said).rendered == "<user>Hi[sad|low]<assistant>"
    assert asked(reasoning_effort="high").rendered == "<user>Hi[kind|high]<assistant>"
    both = {"chat_template_kwargs": {"reasoning_effort": "none"}}
    assert asked(reasoning_effort="high", extra_body=both).rendered == "<user>Hi[kind|none]<assistant>"


def test_turns_can_leave_with_variables_set(asked) -> None:
    runtime = asked(extra_body={"overflow": "drop", "chat_template_kwargs": {"unknown": 1}})
    assert runtime.seen[-1]["prompt"] == ASK
    assert runtime.seen[-1]["template_args"] == {"mood": "kind", "reasoning_effort": "low"}, "what the template reads"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token"])
def test_names_that_belong_to_the_conversation(real, name: str) -> None:
    with served(real) as server:
        client = openai.OpenAI(base_url=f"{server.root}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="cannot be set"):
            client.chat.completions.create(
                model="demo", messages=ASK, extra_body={"chat_template_kwargs": {name: "x"}}, max_tokens=1
            )


def test_tokenize_counts_as_the_chat_does(real) -> None:
    import json
    import urllib.request

    runtime = Scripted(real, "x", template=ChatTemplate.from_text(SOURCE, real.tokenizer))
    with served(runtime, template_args={"mood": "kind"}) as server:
        body = json.dumps({"messages": ASK, "chat_template_kwargs": {"reasoning_effort": "low"}}).encode()
        request = urllib.request.Request(f"{server.root}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            count = json.load(answer)["count"]
        assert runtime.rendered == "<user>Hi[kind|low]<assistant>"
        assert count == len(real.tokenizer.encode(runtime.rendered))

"""Replies that have to match something: response_format, forced calls of tools, guided_*; with the demo model."""

import json

import pytest
from serving import served

import exl_runtime as exl

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
ASK = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me about Norway."}],
    "seed": 1,
    "max_tokens": 120,
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def tool(name, key):
    schema = {"type": "object", "properties": {key: {"enum": ["Oslo", "Rome"]}}, "required": [key]}
    return {"type": "function", "function": {"name": name, "parameters": {**schema, "additionalProperties": False}}}


TOOLS = [tool("weather", "city"), tool("time", "place")]


@pytest.fixture(scope="module")
def create():
    with exl.load("demo", context=512) as runtime, served(runtime) as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0, timeout=60)
        yield lambda **options: client.chat.completions.create(**{**ASK, **options})


def test_json_schema(create) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in (1, 2):
        made = create(response_format=shape, seed=seed).choices[0]
        person = json.loads(made.message.content)
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 99 and made.finish_reason == "stop"
    chunks = create(response_format=shape, seed=2, stream=True)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == person


def test_a_pydantic_model_as_the_client_parses_it() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        age: int = pydantic.Field(ge=0, le=99)

    with exl.load("demo", context=512) as runtime, served(runtime) as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0, timeout=60)
        made = client.chat.completions.parse(**ASK, response_format=Person).choices[0].message.parsed
        assert isinstance(made, Person) and len(made.name) <= 8
        with client.chat.completions.stream(**ASK, response_format=Person) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == made


def test_json_object_begins_as_one(create) -> None:
    text = create(response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call(create, stream) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    for choice, names in ((named, {"time"}), ("required", {"time", "weather"})):
        made = create(tools=TOOLS, tool_choice=choice, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in made]
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
            assert not any(chunk.delta.content for chunk in chunks)
            reason = chunks[-1].finish_reason
        else:
            calls, reason = made.choices[0].message.tool_calls, made.choices[0].finish_reason
        assert len(calls) == 1 and calls[0].function.name in names and reason == "tool_calls"
        (value,) = json.loads(calls[0].function.arguments).values()
        assert value in ("Oslo", "Rome")


def test_fields_of_other_servers(create) -> None:
    def text(**fields):
        return create(extra_body=fields).choices[0].message.content

    assert text(guided_choice=["Bergen", "Trondheim"]) in ("Bergen", "Trondheim")
    assert text(guided_regex="[0-9]{3}").isdigit()
    assert json.loads(text(guided_json={"enum": [5, 6]})) in (5, 6)
    assert text(guided_grammar='start: "a" | "b"') in ("a", "b")


def test_banned_strings(create) -> None:
    plain = create(temperature=0, max_tokens=30).choices[0].message.content
    word = plain.split()[1]
    assert (
        word.lower()
        not in create(temperature=0, max_tokens=30, extra_body={"banned_strings": [word]})
        .choices[0]
        .message.content.lower()
    )


def test_tokens_and_loops_that_end_a_reply(create) -> None:
    def made(**fields):
        return create(**{"temperature": 0, "max_tokens": 60, **fields})

    text = made().choices[0].message.content
    with exl.load("demo", context=256) as runtime:  # only for the number of a token amid the reply
        ids = runtime.generate(ASK["messages"], max_tokens=60, sampling=exl.SamplingParams(temperature=0)).ids
        before = runtime.tokenizer.decode(ids[: ids.index(ids[5])])
    cut = made(extra_body={"stop_token_ids": [ids[5]]}).choices[0]
    assert cut.message.content == before and text.startswith(before) and len(before) < len(text)
    assert cut.finish_reason == "stop"
    around = {"messages": [{"role": "user", "content": "Say: ha ha ha ha"}], "max_tokens": 400}
    looped = made(**around | {"extra_body": {"stop_loop": [1, 2], "logit_bias": {str(ids[5]): 100}}})
    assert looped.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra_body": {"guided_regex": "[", "guided_choice": ["a"]}}, "only one of"),
        ({"extra_body": {"guided_regex": "["}}, "regular expression|regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema must be an object"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"}, "exclude each other"),
        ({"extra_body": {"guided_choice": []}}, "choice needs a list"),
        ({"extra_body": {"stop_token_ids": [True]}}, "list of whole numbers"),
        ({"extra_body": {"stop_token_ids": list(range(1025))}}, "1025 entries"),
        ({"extra_body": {"stop_loop": [8]}}, "stop_loop must be"),
        ({"extra_body": {"stop_loop": [8, 1]}}, "stop_loop must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "one of the tools"),
    ],
)
def test_refusals(create, options, said) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        create(**options)

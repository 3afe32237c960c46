"""Tools, thoughts and constraints over the wire, with replies written down beforehand; read by the official client."""

import json

import pytest
from serving import Scripted, served

import exl_runtime as exl
from exl_runtime.server.choice import Choice, Form
from exl_runtime.tokenizer.template import ChatTemplate
from exl_runtime.tokenizer.tool_calls import ToolCall

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
QUESTION = [{"role": "user", "content": "Weather in Oslo?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WITH_TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "{% endfor %}{% if enable_thinking %}<think>{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def real():
    with exl.load("demo", context=512) as opened:
        yield opened


@pytest.fixture
def answered(real):
    """answered(reply, ...)(options of the request, ...) -> (message, finish_reason, runtime); streamed too."""

    def scripted(reply, template=WITH_TOOLS):
        made = None if template is None else ChatTemplate.from_text(template, real.tokenizer)
        runtime = Scripted(real, reply, template=made)

        def ask(messages=QUESTION, **options):
            options = {"model": "demo", "messages": messages, **options}
            with served(runtime) as serving:
                client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0)
                choice = client.chat.completions.create(**options).choices[0]
                streamed = collect(client.chat.completions.create(**options, stream=True))
            message = choice.message
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
            whole = (message.content, getattr(message, "reasoning_content", None), calls, choice.finish_reason)
            assert streamed == (whole[0] or "", whole[1] or "", *whole[2:]), "streaming gives the same"
            return whole, runtime

        return ask

    return scripted


def collect(chunks):
    """(content, reasoning, calls, finish_reason) of a stream."""
    content, thoughts, calls, reason = "", "", {}, None
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            assert call.index not in calls and call.id and call.type == "function"
            calls[call.index] = (call.function.name, json.loads(call.function.arguments))
        reason = choice.finish_reason or reason
    return content, thoughts, [calls[i] for i in sorted(calls)], reason


def test_tools_reach_the_template_and_calls_come_back(answered) -> None:
    whole, runtime = answered(f"I look.\n{CALL}")(tools=[TOOL])
    assert whole == ("I look.", None, [("weather", {"city": "Oslo"})], "tool_calls")
    assert runtime.rendered == "[weather]<user>Weather in Oslo?"


def test_only_a_call(answered) -> None:
    whole, _ = answered(CALL + "\n" + CALL)(tools=[TOOL])
    assert whole == (None, None, [("weather", {"city": "Oslo"})] * 2, "tool_calls")
    whole, _ = answered(CALL + "\n" + CALL)(tools=[TOOL], parallel_tool_calls=False)
    assert whole[2:] == ([("weather", {"city": "Oslo"})], "tool_calls")


def test_the_streaming_helper_of_the_client(real) -> None:
    """It puts deltas together in its own, stricter way, and tells of calls as they are complete."""
    reply = f"<think>Hm.</think>I look.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}"
    runtime = Scripted(real, reply, template=ChatTemplate.from_text(WITH_TOOLS, real.tokenizer))
    strict = json.loads(json.dumps(TOOL))
    strict["function"]["strict"] = True
    strict["function"]["parameters"]["additionalProperties"] = False
    with served(runtime) as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0)
        with client.chat.completions.stream(model="demo", messages=QUESTION, tools=[strict]) as stream:
            events = list(stream)
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [call.function.parsed_arguments for call in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
    assert len({call.id for call in calls}) == 2 and final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.content == "I look."
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, json.loads(event.arguments)["city"]) for event in done] == [
        ("weather", "Oslo"),
        ("weather", "Rome"),
    ]
    assert [event.content for event in events if event.type == "content.done"] == ["I look."]


def test_without_tools_nothing_is_looked_for(answered) -> None:
    assert answered(CALL)()[0] == (CALL, None, [], "stop")
    whole, runtime = answered(CALL)(tools=[TOOL], tool_choice="none")
    assert whole == (CALL, None, [], "stop") and "[weather]" not in runtime.rendered


HISTORY = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abc", "content": "rain"},
]


def test_results_of_tools_go_back(answered) -> None:
    whole, runtime = answered("It rains.")(HISTORY, tools=[TOOL])
    assert whole == ("It rains.", None, [], "stop")
    assert runtime.rendered.endswith("<assistant><tool_call>Oslo</tool_call><tool>rain"), "arguments are an object"


def test_a_template_without_tools_gets_them_in_words(answered) -> None:
    whole, runtime = answered('```json\n{"name": "weather", "arguments": {"city": "Oslo"}}\n```', template=None)(
        HISTORY, tools=[TOOL]
    )
    assert whole == (None, None, [("weather", {"city": "Oslo"})], "tool_calls")
    assert '"description": "the weather of a city"' in runtime.rendered
    assert "Result:\nrain" in runtime.rendered and runtime.rendered.count("```json") == 2


def test_thoughts_are_separated(answered) -> None:
    reply = "<think>\nOslo... rain?\n</think>\n\nRain."
    assert answered(reply)()[0] == ("Rain.", "Oslo... rain?", [], "stop")
    assert answered(reply)(extra_body={"separate_reasoning": False})[0][0] == reply
    begun = answered("Rain?</think>Rain.")(extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert begun[0] == ("Rain.", "Rain?", [], "stop") and begun[1].rendered.endswith("<think>")
    both = answered(f"<think>Hm</think>{CALL}")(tools=[TOOL])[0]
    assert both == (None, "Hm", [("weather", {"city": "Oslo"})], "tool_calls")


def test_an_error_amid_a_reply_is_told(real) -> None:
    with served(Scripted(real, MemoryError("boom"))) as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the server failed") as caught:
            client.chat.completions.create(model="demo", messages=QUESTION)
        assert "boom" not in str(caught.value)


def test_impossible_logprobs_are_numbers(real) -> None:
    with served(Scripted(real, "hello")) as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0)
        made = client.chat.completions.create(model="demo", messages=QUESTION, logprobs=True, top_logprobs=2)
        assert [best.logprob for best in made.choices[0].logprobs.content[0].top_logprobs] == [-0.5, -9999.0]


class Names:
    """A tokenizer of nothing but special tokens."""

    names = ("<|end|>", "[TOOL_CALLS]", "[ARGS]", "<s>")
    special_ids = frozenset(range(4))

    def piece(self, token):
        return self.names[token]


def test_marks_that_are_special_tokens_are_seen_and_the_others_removed(real) -> None:
    runtime = Scripted(real, "", template=ChatTemplate.from_text("[TOOL_CALLS] {{ tools }}", real.tokenizer))
    runtime.tokenizer = Names()
    options = {"split": True, "one_call": False, "constrained": False}
    assert Form.of(runtime, "", schemas={}, **options).skip_special
    form = Form.of(runtime, "", schemas={"weather": {}}, **options)
    assert Form.of(runtime, "x<think>", schemas={}, **options).inside
    assert not Form.of(runtime, "x<think>", schemas={}, **options | {"constrained": True}).inside, "it is no thought"
    assert not form.skip_special and form.hidden == {"<|end|>", "<s>"}
    text = '<s>So <|e[TOOL_CALLS]weather[ARGS]{"city": "Os<|end|>lo"}<|end|>'
    for size in (1, 4, len(text)):
        choice = Choice(form)
        found = [delta for i in range(0, len(text), size) for delta in choice.push(text[i : i + size])]
        found += choice.finish()
        assert "".join(delta[1] for delta in found if isinstance(delta, tuple)) == "So <|e"
        assert [delta for delta in found if not isinstance(delta, tuple)] == [ToolCall("weather", '{"city": "Oslo"}')]

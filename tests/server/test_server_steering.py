"""Guidance, scores of prompts, the best of several, priorities, adapters: fields beyond OpenAI's, by its client."""

import json

import pytest
from adapters import shapes_of, write_adapter
from serving import served

import exl_runtime as exl

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
GREEDY = exl.SamplingParams(temperature=0)
ASK = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    with exl.load("demo", context=512, threads=1) as opened:
        opened.load_lora(write_adapter(tmp_path_factory.mktemp("loras") / "tale", shapes_of(opened._engine().model)))
        yield opened


@pytest.fixture(scope="module")
def serving(runtime):
    with served(runtime) as running:
        yield running


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


def chat(client, messages=ASK, **fields):
    options = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24}
    return client.chat.completions.create(**options, extra_body=fields)


def complete(client, prompt="Once upon a time", extra_body=None, **options):
    options = {"model": "demo", "temperature": 0, "max_tokens": 12, **options}
    return client.completions.create(prompt=prompt, extra_body=extra_body, **options)


def test_guidance_is_what_the_runtime_does_with_both_prompts(client, runtime) -> None:
    away = [{"role": "system", "content": "You tell long stories."}, ASK[1]]
    wanted = runtime.generate(ASK, max_tokens=24, sampling=GREEDY, negative_prompt=away, guidance=3.0).text
    plain = chat(client).choices[0].message.content
    for name in ("guidance_scale", "cfg_scale"):
        made = chat(client, negative_prompt="You tell long stories.", **{name: 3})
        assert made.choices[0].message.content == wanted != plain
    bare = runtime.generate(ASK, max_tokens=24, sampling=GREEDY, negative_prompt=ASK[1:], guidance=3.0).text
    assert chat(client, guidance_scale=3).choices[0].message.content == bare, "away from no system prompt"
    assert (
        chat(client, ASK[1:], guidance_scale=3).choices[0].message.content
        == chat(client, ASK[1:]).choices[0].message.content
    )
    wanted = runtime.generate(
        "The old man", max_tokens=12, sampling=GREEDY, negative_prompt="The cat", guidance=2.5
    ).text
    for negative in ("The cat", runtime.tokenizer.encode("The cat", add_bos=None)):
        fields = {"negative_prompt": negative, "guidance_scale": 2.5}
        assert complete(client, "The old man", fields).choices[0].text == wanted
    chunks = complete(client, "The old man", fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted


def test_guidance_without_a_limit_ends_with_the_context(client) -> None:
    options = {"model": "demo", "messages": ASK, "extra_body": {"guidance_scale": 1.5, "ignore_eos": True}}
    made = client.chat.completions.create(**options, seed=1)
    assert made.choices[0].finish_reason == "length" and made.usage.total_tokens == 512


def test_scores_of_the_prompt(client, runtime) -> None:
    ids = runtime.tokenizer.encode("Once upon a time there was a cat.", add_bos=None)
    scores = runtime.logits(ids).log_softmax(-1)
    made = complete(client, ids, {"prompt_logprobs": 2}, n=2)
    for choice in made.choices:
        assert len(choice.prompt_logprobs) == len(ids) and choice.prompt_logprobs[0] is None
        for place, entries in enumerate(choice.prompt_logprobs[1:]):
            own = entries[str(ids[place + 1])]
            assert own["logprob"] == pytest.approx(scores[place, ids[place + 1]].item(), abs=1e-3)
            assert own["decoded_token"] == runtime.tokenizer.text_of(ids[place + 1])
            best = scores[place].topk(2).indices.tolist()
            assert [entries[str(token)]["rank"] for token in best] == [1, 2]
            assert len(entries) == 2 + (ids[place + 1] not in best)
    made = chat(client, prompt_logprobs=0)
    assert len(made.prompt_logprobs) == made.usage.prompt_tokens
    assert all(len(entries) == 1 for entries in made.prompt_logprobs[1:])


def test_best_of_gives_the_likeliest(client) -> None:
    options = {"temperature": 1.5, "seed": 3, "logprobs": 1}
    all_of_them = complete(client, n=6, **options)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in all_of_them.choices]
    ranked = [all_of_them.choices[i].text for i in sorted(range(6), key=lambda i: -means[i])]
    made = complete(client, n=2, best_of=6, **options)
    assert [(choice.index, choice.text) for choice in made.choices] == [(0, ranked[0]), (1, ranked[1])]
    assert made.usage.completion_tokens == all_of_them.usage.completion_tokens, "all that was made is paid for"
    without = complete(client, ["Once upon a time", "The cat"], best_of=3, temperature=1.5, seed=3)
    assert len(without.choices) == 2 and all(choice.logprobs is None for choice in without.choices)


def test_beginnings(client, runtime) -> None:
    wanted = runtime.generate(ASK, max_tokens=24, sampling=GREEDY, prefix="Well, ").text
    for name in ("prefix", "response_prefix"):
        assert chat(client, **{name: "Well, "}).choices[0].message.content == wanted
    healed = runtime.generate("Once upon a ti", max_tokens=12, sampling=GREEDY, heal=True).text
    assert complete(client, "Once upon a ti", {"token_healing": True}).choices[0].text == healed
    assert healed.startswith("me")


def test_a_reply_that_the_client_began(client, runtime) -> None:
    begun = "The fox said that"
    prompt = [*runtime.render(ASK).ids, *runtime.tokenizer.encode(begun, parse_special=False)]
    wanted = runtime.generate(prompt, max_tokens=24, sampling=GREEDY).text
    messages = [*ASK, {"role": "assistant", "content": begun}]
    for fields in ({}, {"add_generation_prompt": False}):
        made = chat(client, messages, continue_final_message=True, **fields)
        assert made.choices[0].message.content == wanted and made.usage.prompt_tokens == len(prompt)
    open_end = runtime.generate(
        list(runtime.render(ASK, add_generation_prompt=False).ids), max_tokens=24, sampling=GREEDY
    )
    assert chat(client, add_generation_prompt=False).usage.prompt_tokens == open_end.prompt_tokens


def test_adapters_by_request(client, runtime) -> None:
    plain = chat(client).choices[0].message.content
    for lora in ("tale", ["tale"], {"tale": 1.0}):
        wanted = runtime.generate(ASK, max_tokens=24, sampling=GREEDY, lora="tale").text
        assert chat(client, lora=lora).choices[0].message.content == wanted
    listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert listed == {"demo": None, "tale": "demo"} and client.models.retrieve("tale").parent == "demo"
    options = {"messages": ASK, "temperature": 0, "max_tokens": 24}
    made = client.chat.completions.create(model="tale", **options)
    assert made.choices[0].message.content == wanted != plain and made.model == "tale", "as a model of its own"
    chunks = list(client.chat.completions.create(model="tale", stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted and chunks[0].model == "tale"
    assert client.completions.create(model="tale", prompt="x", max_tokens=1).model == "tale"
    with pytest.raises(openai.NotFoundError, match="no model 'tales'"):
        client.chat.completions.create(model="tales", **options)
    runtime.set_lora("tale")
    try:
        assert chat(client, lora=[]).choices[0].message.content == plain
    finally:
        runtime.set_lora(None)


def test_priorities_and_names_of_other_servers(client, runtime, monkeypatch) -> None:
    seen = []
    stream = runtime.stream
    monkeypatch.setattr(runtime, "stream", lambda **order: (seen.append(order), stream(**order))[1])
    chat(client, priority=-3)
    assert seen[-1]["priority"] == 3, "a smaller number goes first in this protocol"
    chat(client, bad_words=["fox"], banned_strings=["dog"], top_k=-1)
    assert seen[-1]["banned_strings"] == ("dog", "fox") and seen[-1]["sampling"].top_k == 0
    made = complete(client, "x", {"allowed_token_ids": [20, 21, 22]}, temperature=1)
    assert seen[-1]["sampling"].allowed_tokens == (20, 21, 22)
    assert set(made.choices[0].text) <= set(runtime.tokenizer.decode([20, 21, 22]))
    eos = runtime.tokenizer.eos_id
    shown = complete(client, runtime.tokenizer.encode("x"), {"skip_special_tokens": False, "allowed_token_ids": [eos]})
    assert seen[-1]["skip_special"] is False and shown.choices[0].finish_reason == "stop"


def test_structured_outputs(client) -> None:
    pytest.importorskip("llguidance")
    text = lambda **shape: chat(client, structured_outputs=shape).choices[0].message.content  # noqa: E731
    assert text(choice=["Bergen", "Trondheim"]) in ("Bergen", "Trondheim")
    assert text(regex="[0-9]{3}").isdigit() and json.loads(text(json={"enum": [5, 6]})) in (5, 6)
    assert text(grammar='start: "a" | "b"') in ("a", "b")


def test_a_full_context_as_the_server_was_told(runtime) -> None:
    long = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 40} for i in range(31)]
    with served(runtime, overflow="drop") as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0, timeout=60)
        made = chat(client, long)
        assert made.truncated["turns"] > 0
        with pytest.raises(openai.BadRequestError, match="the context holds 512"):
            chat(client, long, overflow="error")
        tool = {"type": "function", "function": {"name": "weather"}}
        options = {"model": "demo", "messages": long, "max_tokens": 4, "tools": [tool]}
        assert client.chat.completions.create(**options).truncated["tokens"] > 0, "a window, where turns cannot go"
        assert complete(client, "word " * 600).truncated["tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guidance_scale": -1}, "guidance_scale must be a number from 0 to 100"),
        ({"guidance_scale": 2, "negative_prompt": [1]}, "negative_prompt must be a text"),
        ({"lora": "absent"}, "no adapter 'absent'"),
        ({"lora": {"tale": "x"}}, "lora must be the name"),
        ({"priority": 1.5}, "priority must be a whole number"),
        ({"continue_final_message": True}, "needs a last message by the assistant"),
        ({"skip_special_tokens": False}, "never shown"),
        ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "only one of"),
        ({"structured_outputs": {"gbnf": "x"}}, "unknown field structured_outputs.gbnf"),
        ({"prompt_logprobs": 2, "stream": True}, "prompt_logprobs cannot be streamed"),
        ({"prefix": "x", "guided_choice": ["y"]}, "the grammar|prefix"),
        ({"best_of": 2}, "unknown field best_of"),
    ],
)
def test_refusals_of_chats(client, fields, said) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        chat(client, **fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 3, "best_of": 2}, "best_of must be a whole number from 3"),
        ({"best_of": 2, "stream": True}, "best_of cannot be streamed"),
        ({"extra_body": {"guidance_scale": 2}}, "negative_prompt must be a text or token ids"),
        ({"extra_body": {"token_healing": True, "prefix": "x"}}, "heal cannot be combined"),
        ({"suffix": "x"}, "writes at the end only"),
    ],
)
def test_refusals_of_completions(client, options, said) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        complete(client, **options)

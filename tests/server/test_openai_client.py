"""The official client against a real server with the demo model: what an app of the user sees."""

import asyncio
import time

import pytest
from serving import served, wait_for

import exl_runtime as exl

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
NORWAY = [{"role": "user", "content": "What is the capital of Norway?"}]
STORY = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def runtime():
    with exl.load("demo", context=512) as opened:
        yield opened


@pytest.fixture(scope="module")
def serving(runtime):
    with served(runtime, parallel=8, queue=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(serving):
    with openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


def ask(client, messages=NORWAY, **options):
    return client.chat.completions.create(**{"model": "demo", "messages": messages, "temperature": 0, **options})


def test_chat(client, runtime) -> None:
    made = ask(client)
    choice = made.choices[0]
    direct = runtime.generate(NORWAY, sampling=exl.SamplingParams(temperature=0))
    assert choice.message.content == direct.text and "Oslo" in direct.text
    assert (choice.message.role, choice.finish_reason, made.object) == ("assistant", "stop", "chat.completion")
    assert made.usage.prompt_tokens == direct.prompt_tokens == len(runtime.render(NORWAY).ids)
    assert made.usage.completion_tokens == direct.generated_tokens
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_a_prompt_seen_before_comes_from_the_cache(client) -> None:
    messages = [{"role": "user", "content": "Is water wet, or what is it?"}]
    first, second = (ask(client, messages, max_tokens=2).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < first.prompt_tokens - 8
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1


def test_streaming_gives_the_same(client) -> None:
    whole = ask(client, max_tokens=20)
    chunks = list(ask(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 5
    assert all(chunk.usage is None for chunk in ask(client, max_tokens=2, stream=True))


def test_length_stop_and_bias(client, runtime) -> None:
    assert ask(client, STORY, max_completion_tokens=3).choices[0].finish_reason == "length"
    made = ask(client, stop=["Norway"])
    assert made.choices[0].message.content == "The capital of " and made.choices[0].finish_reason == "stop"
    the = runtime.tokenizer.encode("The")[0]
    assert not ask(client, max_tokens=3, logit_bias={str(the): -100}).choices[0].message.content.startswith("The")


def test_logprobs(client, runtime) -> None:
    made = ask(client, max_tokens=4, logprobs=True, top_logprobs=3)
    entries = made.choices[0].logprobs.content
    assert len(entries) == 4 and "".join(e.token for e in entries) == made.choices[0].message.content
    direct = runtime.generate(NORWAY, max_tokens=4, sampling=exl.SamplingParams(temperature=0), logprobs=3)
    assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in direct.logprobs], abs=1e-4)
    assert all(len(e.top_logprobs) == 3 and e.top_logprobs[0].token == e.token for e in entries)
    assert bytes(entries[0].bytes).decode() == entries[0].token
    streamed = ask(client, max_tokens=4, logprobs=True, stream=True)
    found = [e for c in streamed if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in found] == [e.token for e in entries] and not found[0].top_logprobs


def test_seed_and_samples(client) -> None:
    def texts(**options):
        made = ask(client, STORY, temperature=1.5, n=3, max_tokens=12, **options)
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        return [choice.message.content for choice in made.choices]

    first = texts(seed=7)
    assert first == texts(seed=7)
    assert len(set(first)) > 1, "samples of one request differ"
    assert texts(seed=8) != first


def test_own_parameters(client) -> None:
    wild = {"temperature": 3.0, "max_tokens": 8, "seed": 1}
    greedy = ask(client, STORY, max_tokens=8).choices[0].message.content
    assert ask(client, STORY, **wild, extra_body={"top_k": 1, "min_p": 0}).choices[0].message.content == greedy
    assert ask(client, STORY, **wild, extra_body={"min_p": 0}).choices[0].message.content != greedy


def test_completions(client, runtime) -> None:
    options = {"model": "demo", "temperature": 0, "max_tokens": 6}
    made = client.completions.create(prompt=["Once upon", "The cat"], n=2, logprobs=2, **options)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    direct = runtime.generate("Once upon", max_tokens=6, sampling=exl.SamplingParams(temperature=0))
    assert made.choices[0].text == made.choices[1].text == direct.text
    logprobs = made.choices[0].logprobs
    assert "".join(logprobs.tokens) == direct.text and logprobs.text_offset[0] == 0
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert all(len(best) == 2 for best in logprobs.top_logprobs)
    lengths = [len(runtime.tokenizer.encode(text, add_bos=None)) for text in ("Once upon", "The cat")]
    assert made.usage.prompt_tokens == sum(lengths), "a prompt counts once, however many samples it has"
    ids = runtime.tokenizer.encode("Once upon", add_bos=None)
    assert client.completions.create(prompt=ids, echo=True, **options).choices[0].text.endswith("upon" + direct.text)
    chunks = client.completions.create(prompt="Once upon", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == direct.text
    assert client.completions.create(model="demo", prompt="Once upon", seed=1).usage.completion_tokens <= 16


def test_a_scored_prompt(client, runtime) -> None:
    text = "Once upon a time there was a cat."
    made = client.completions.create(model="demo", prompt=text, echo=True, logprobs=2, max_tokens=1, temperature=0)
    choice, ids = made.choices[0], runtime.tokenizer.encode(text, add_bos=None)
    assert len(choice.logprobs.tokens) == len(ids) + 1 and choice.text.startswith(text)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    scores = runtime.logits(ids).log_softmax(-1)
    wanted = [scores[i, token].item() for i, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-3)
    for token, offset in list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))[1:-1]:
        assert choice.text[offset:].startswith(token)


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "this server has 'demo'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n must be a whole number from 1"),
        ({"n": 17}, openai.BadRequestError, "takes 16 at once"),
        ({"messages": []}, openai.BadRequestError, "messages is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, r"messages\[0\].role"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "has no content"),
        ({"top_logprobs": 2}, openai.BadRequestError, "needs logprobs"),
        ({"stop": [""]}, openai.BadRequestError, "none of them empty"),
        ({"logit_bias": {"the": 1}}, openai.BadRequestError, "token ids"),
        ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "99999999"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "did you mean temperature"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, openai.BadRequestError, "the context holds 512"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "writes text only"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format.type"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice must be"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client, options, error, said, stream) -> None:
    with pytest.raises(error, match=said) as caught:
        ask(client, **({"max_tokens": 3, "stream": stream} | options))
    assert caught.value.body["type"] == "invalid_request_error" and caught.value.body["message"]
    if "word" in str(options):
        assert caught.value.code == "context_length_exceeded"


def test_embeddings_are_refused_with_the_reason(client) -> None:
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        client.embeddings.create(model="demo", input="text")


def test_images_are_refused(client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xxxx"}}
    with pytest.raises(openai.BadRequestError, match="takes text, not 'image_url'"):
        ask(client, [{"role": "user", "content": [part]}])
    text = {"type": "text", "text": NORWAY[0]["content"]}
    assert "Oslo" in ask(client, [{"role": "user", "content": [text]}]).choices[0].message.content


def test_clients_at_once_run_together(serving, runtime) -> None:
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, [question], max_tokens=24) for question in questions))

    questions = [
        {"role": "user", "content": f"What is the capital of {land}?"}
        for land in ("Norway", "Italy", "France", "Spain")
    ] * 2
    alone = [
        runtime.generate([question], max_tokens=24, sampling=exl.SamplingParams(temperature=0)).text
        for question in questions
    ]
    before = runtime._generator.stats.steps
    together = [made.choices[0].message.content for made in asyncio.run(all_of_them())]
    steps = runtime._generator.stats.steps - before
    assert together == alone, "a reply does not depend on its neighbours"
    assert steps < 8 * 12, "eight replies share their steps"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(serving, runtime, stream) -> None:
    async def leave():
        async with openai.AsyncOpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0) as client:
            options = {"temperature": 1, "max_tokens": 480, "extra_body": {"ignore_eos": True}, "n": 2}
            if stream:
                chunks = await ask(client, STORY, stream=True, **options)
                async for chunk in chunks:
                    if chunk.choices and chunk.choices[0].delta.content:
                        break
                await chunks.close()
            else:
                task = asyncio.create_task(ask(client, STORY, **options))
                while not runtime.stats.running:
                    await asyncio.sleep(0.005)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    wait_for(lambda: not runtime.stats.running)
    before = runtime.stats.generated_tokens
    asyncio.run(leave())
    wait_for(lambda: not runtime.stats.running and not serving.desk.pending)
    assert runtime.stats.pages_held == 0
    assert runtime.stats.generated_tokens - before < 900, "it did not run to the end"


def test_stopping_ends_replies_after_the_grace(runtime) -> None:
    with served(runtime, grace=1) as serving:
        client = openai.OpenAI(base_url=f"{serving.root}/v1", api_key="any", max_retries=0)
        options = {"overflow": "window", "ignore_eos": True}
        chunks = iter(ask(client, STORY, stream=True, max_tokens=100_000, extra_body=options))
        next(chunks)
        wait_for(lambda: runtime.stats.running)
        started = time.monotonic()
        serving.server.should_exit = True
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length", "in good order, with what there is"
        assert 0.8 < time.monotonic() - started < 10
        wait_for(lambda: not runtime.stats.running)
    assert runtime.stats.pages_held == 0


def test_nothing_begins_once_the_server_stops(serving, client) -> None:
    serving.desk.shut()
    try:
        with pytest.raises(openai.InternalServerError, match="stopping") as caught:
            ask(client)
        assert caught.value.status_code == 503
    finally:
        serving.desk._open = True

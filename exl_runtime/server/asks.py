"""From the body of a request to what is asked. Checks everything that needs no model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..generation.grammar import Grammar
from ..sampling.params import SamplingParams
from .constraints import forced_call, read_format, read_guide
from .fields import Fields
from .messages import Tool, read_messages, read_tools
from .problems import ApiError
from .settings import Settings
from .steering import Leading, read_leading, read_sampling, read_steering

MOST_CHOICES = 64
MOST_PROMPTS = 256
MOST_LOGPROBS = 100
MOST_TOKENS = 2**31
COMPLETION_TOKENS = 16  # the default of the protocol for plain completions
OVERFLOWS = ("error", "drop", "window")
NOTED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What both kinds of completion can ask for.

    model      the name to answer under: that of the server, or of the adapter that was asked for as a model
    logprobs   None: none; else how many of the best tokens beside the drawn one; `prompt_logprobs`: of the prompt
    grammar    what the reply has to match
    steering   further arguments of `Runtime.stream`
    leading    what the reply is led away from
    """

    model: str
    n: int
    max_tokens: int | None
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    logprobs: int | None
    prompt_logprobs: int | None
    overflow: str
    grammar: Grammar | None
    steering: Mapping[str, Any]
    leading: Leading | None

    def order(self, prompt: Any, sample: int) -> dict[str, Any]:
        """The arguments of `Runtime.stream` for one sequence. With a seed, every sample has its own, the same each
        time."""
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + sample) % 2**64)
        return {
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "sampling": sampling,
            "overflow": self.overflow,
            "logprobs": 0 if self.logprobs is None else max(1, self.logprobs),
            "prompt_logprobs": 0 if self.prompt_logprobs is None else max(1, self.prompt_logprobs),
            "grammar": self.grammar,
            **self.steering,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAsk(Ask):
    """Raw texts or token ids to go on with. `best_of`: replies that are made, of which the `n` likeliest are given."""

    prompts: tuple[Any, ...]
    echo: bool
    best_of: int
    skip_special: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAsk(Ask):
    """A conversation to go on with.

    tools              what the model may call; `forced`: the reply has to be a call
    template_args      further variables of the chat template
    split_reasoning    thoughts go into reasoning_content
    continues          the last message is the beginning of the reply
    generates          the prompt ends where a reply begins
    """

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...]
    forced: bool
    parallel_calls: bool
    template_args: Mapping[str, Any]
    split_reasoning: bool
    continues: bool
    generates: bool


def read_chat(body: dict[str, Any], settings: Settings, adapters: Collection[str] = ()) -> ChatAsk:
    """Raises ApiError naming the field that is wrong. adapters: names that can be asked for as models."""
    given = Fields(body)
    named = check_model(given, settings, adapters)
    messages = read_messages(given.items("messages"))
    tools = read_tools(given.items("tools"))
    choice, forced = _tool_choice(given, tools)
    top = given.whole("top_logprobs", 0, MOST_LOGPROBS)
    wanted = given.flag("logprobs", False)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    longer = given.whole("max_completion_tokens", 1, MOST_TOKENS)
    effort = given.text("reasoning_effort")
    template_args = {
        **settings.template_args,
        **({} if effort is None else {"reasoning_effort": effort}),
        **given.mapping("chat_template_kwargs"),
    }
    split = given.flag("separate_reasoning", True)
    parallel_calls = given.flag("parallel_tool_calls", True)
    shape = read_format(given)
    continues = given.flag("continue_final_message", False)
    generates = given.flag("add_generation_prompt", True)
    if continues and messages[-1]["role"] != "assistant":
        raise ApiError(400, "continue_final_message needs a last message by the assistant", param="messages")
    given.refuse("skip_special_tokens", "special tokens are never shown in a chat", True)
    given.ignore("verbosity")
    given.refuse("functions", "use tools")
    given.refuse("function_call", "use tool_choice")
    given.refuse("modalities", "this server writes text only", ["text"])
    given.refuse("audio", "this server writes text only")
    given.refuse("prediction", "predicted outputs are not supported")
    given.refuse("web_search_options", "this server has no access to the web")
    whole = not (tools or continues or not generates)
    common = _common(given, settings, named, settings.max_tokens, turns=whole)
    if longer is not None:
        common["max_tokens"] = longer
    leading = common["leading"]
    if leading is not None and not isinstance(leading.negative, str | None):
        raise given.wrong("negative_prompt", "must be a text, in place of the system prompt", leading.negative)
    given.done()
    grammars = [g for g in (shape, common.pop("grammar"), forced_call(tools, choice) if forced else None) if g]
    if len(grammars) > 1:
        raise ApiError(
            400, "response_format, guided_* and a forced tool_choice exclude each other", param="tool_choice"
        )
    return ChatAsk(
        **common,
        logprobs=(top or 0) if wanted else None,
        messages=messages,
        grammar=grammars[0] if grammars else None,
        tools=tools if choice != "none" else (),
        forced=forced,
        parallel_calls=parallel_calls,
        template_args=template_args,
        split_reasoning=split,
        continues=continues,
        generates=generates,
    )


def read_completion(body: dict[str, Any], settings: Settings, adapters: Collection[str] = ()) -> CompletionAsk:
    """As `read_chat`."""
    given = Fields(body)
    named = check_model(given, settings, adapters)
    prompts = _prompts(given.take("prompt"))
    echo = given.flag("echo", False)
    logprobs = given.whole("logprobs", 0, MOST_LOGPROBS)
    common = _common(given, settings, named, COMPLETION_TOKENS, turns=False)
    if echo and logprobs is not None and common["stream"]:
        raise ApiError(400, "echo with logprobs scores the prompt, which cannot be streamed", param="echo")
    given.refuse("suffix", "this model writes at the end only", "")
    best_of = given.whole("best_of", common["n"], MOST_CHOICES) or common["n"]
    if best_of > common["n"] and common["stream"]:
        raise ApiError(400, "which replies are best is known at the end: best_of cannot be streamed", param="best_of")
    heal = given.flag("token_healing", False)
    common["steering"] = {**common["steering"], "heal": heal}
    leading = common["leading"]
    if leading is not None and not (_is_prompt(leading.negative) and leading.negative):
        raise given.wrong("negative_prompt", "must be a text or token ids, not empty", leading.negative)
    special = given.flag("skip_special_tokens", True)
    given.done()
    return CompletionAsk(**common, logprobs=logprobs, prompts=prompts, echo=echo, best_of=best_of, skip_special=special)


def led_away(ask: Ask, negative: Any, length: int, context: int) -> dict[str, Any]:
    """Arguments of `Runtime.stream`: away from what follows `negative`. A reply without a limit gets the one that the
    longer of the two prompts leaves; `length`: tokens of the prompt itself."""
    assert ask.leading is not None
    options = {"negative_prompt": negative, "guidance": ask.leading.scale}
    if ask.max_tokens is None:
        options["max_tokens"] = max(1, context - max(len(negative), length))
    return options


def check_model(given: Fields, settings: Settings, adapters: Collection[str] = ()) -> str | None:
    """The model a request names has to be the one that is served; no name means that one too. The name of one of
    `adapters` means the model with that adapter, and is returned."""
    name = given.text("model")
    if name in adapters:
        return name
    if name is not None:
        require_model(name, settings)
    return None


def require_model(name: str, settings: Settings) -> None:
    """Raise ApiError 404 unless `name` means the model of this server."""
    if name != settings.name and name not in settings.aliases and "*" not in settings.aliases:
        raise ApiError(
            404,
            f"there is no model {name!r:.100} here, this server has {settings.name!r}",
            param="model",
            code="model_not_found",
        )


def _common(
    given: Fields, settings: Settings, adapter: str | None, max_tokens: int | None, *, turns: bool
) -> dict[str, Any]:
    """Fields of an Ask. turns: of the prompt, whole turns can be left out."""
    stream = given.flag("stream", False)
    options = given.take("stream_options")
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    inner = Fields(options if isinstance(options, dict) else {}, "stream_options.")
    include_usage = inner.flag("include_usage", False)
    inner.ignore("include_obfuscation")
    inner.done()
    given.ignore(*NOTED)
    scored = given.whole("prompt_logprobs", 0, MOST_LOGPROBS)
    if scored is not None and stream:
        raise ApiError(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")
    usual = settings.overflow if turns or settings.overflow != "drop" else "window"
    return {
        "model": adapter or settings.name,
        "n": given.whole("n", 1, MOST_CHOICES) or 1,
        "max_tokens": given.whole("max_tokens", 1, MOST_TOKENS) or max_tokens,
        "sampling": read_sampling(given, settings.sampling),
        "stream": stream,
        "include_usage": include_usage,
        "prompt_logprobs": scored,
        "overflow": given.choice("overflow", OVERFLOWS, usual),
        "grammar": read_guide(given),
        "steering": ({"lora": adapter} if adapter else {}) | read_steering(given),
        "leading": read_leading(given),
    }


def _prompts(value: Any) -> tuple[Any, ...]:
    """One prompt or several, each a text or a list of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(_is_id(item) for item in value):
        return (value,)
    if not isinstance(value, list) or not value or not all(_is_prompt(item) for item in value):
        raise ApiError(400, "prompt must be a text, a list of token ids, or a list of these", param="prompt")
    if len(value) > MOST_PROMPTS:
        raise ApiError(400, f"{len(value)} prompts are too many, at most {MOST_PROMPTS} are allowed", param="prompt")
    return tuple(value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(_is_id(item) for item in value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tool_choice(given: Fields, tools: tuple[Tool, ...]) -> tuple[str, bool]:
    """("none" | "auto" | "required" | name of a tool, whether a call is demanded)"""
    value = given.take("tool_choice")
    names = [tool.name for tool in tools]
    if value in (None, "auto", "none"):
        return value or "auto", False
    if value == "required" and names:
        return "required", True
    inner = value.get("function") if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if name not in names:
        known = f"auto, none, required, or one of the tools ({', '.join(names) or 'none is given'})"
        raise ApiError(400, f"tool_choice must be {known}", param="tool_choice")
    return name, True

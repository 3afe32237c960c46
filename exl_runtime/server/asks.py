"""From the body of a request to what is asked. Checks everything that needs no model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UsageError
from ..generation.grammar import Grammar
from ..sampling.params import SamplingParams
from .constraints import forced_call, read_format, read_guide
from .fields import Fields
from .messages import Tool, read_messages, read_tools
from .problems import ApiError
from .settings import Settings

MOST_STOPS = 16
MOST_BANNED = 256
MOST_STOP_IDS = 1024
MOST_CHOICES = 64
MOST_PROMPTS = 256
MOST_LOGPROBS = 100
MOST_TOKENS = 2**31
COMPLETION_TOKENS = 16  # the default of the protocol for plain completions
OVERFLOWS = ("error", "drop", "window")
NOTED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
SAMPLING = tuple(entry.name for entry in fields(SamplingParams) if entry.name != "logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What both kinds of completion can ask for.

    logprobs   None: none; else how many of the best tokens beside the drawn one
    deadline   seconds, queueing included
    grammar    what the reply has to match; `banned_strings`: what it must not contain; `stop_ids`: what ends it
    stop_loop  (longest, times): it ends when up to `longest` tokens came so often in a row
    """

    n: int
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None
    overflow: str
    deadline: float | None
    grammar: Grammar | None
    banned_strings: tuple[str, ...]
    stop_ids: tuple[int, ...]
    stop_loop: tuple[int, int] | None

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
            "stop": self.stop,
            "overflow": self.overflow,
            "deadline": self.deadline,
            "logprobs": 0 if self.logprobs is None else max(1, self.logprobs),
            "grammar": self.grammar,
            "banned_strings": self.banned_strings,
            "stop_ids": self.stop_ids,
            "stop_loop": self.stop_loop,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAsk(Ask):
    """Raw texts or token ids to go on with."""

    prompts: tuple[Any, ...]
    echo: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAsk(Ask):
    """A conversation to go on with.

    tools              what the model may call; `forced`: the reply has to be a call
    template_values    further variables of the chat template
    split_reasoning    thoughts go into reasoning_content
    """

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...]
    forced: bool
    parallel_calls: bool
    template_values: Mapping[str, Any]
    split_reasoning: bool


def read_chat(body: dict[str, Any], settings: Settings) -> ChatAsk:
    """Raises ApiError naming the field that is wrong."""
    given = Fields(body)
    check_model(given, settings)
    messages = read_messages(given.items("messages"))
    tools = read_tools(given.items("tools"))
    choice, forced = _tool_choice(given, tools)
    top = given.whole("top_logprobs", 0, MOST_LOGPROBS)
    wanted = given.flag("logprobs", False)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    longer = given.whole("max_completion_tokens", 1, MOST_TOKENS)
    template_values = given.mapping("chat_template_kwargs")
    if (effort := given.text("reasoning_effort")) is not None:
        template_values = {"reasoning_effort": effort, **template_values}
    split = given.flag("separate_reasoning", True)
    parallel_calls = given.flag("parallel_tool_calls", True)
    shape = read_format(given)
    given.ignore("verbosity")
    given.refuse("functions", "use tools")
    given.refuse("function_call", "use tool_choice")
    given.refuse("modalities", "this server writes text only", ["text"])
    given.refuse("audio", "this server writes text only")
    given.refuse("prediction", "predicted outputs are not supported")
    given.refuse("web_search_options", "this server has no access to the web")
    common = _common(given, settings, settings.max_tokens)
    if longer is not None:
        common["max_tokens"] = longer
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
        template_values=template_values,
        split_reasoning=split,
    )


def read_completion(body: dict[str, Any], settings: Settings) -> CompletionAsk:
    """Raises ApiError naming the field that is wrong."""
    given = Fields(body)
    check_model(given, settings)
    prompts = _prompts(given.take("prompt"))
    echo = given.flag("echo", False)
    logprobs = given.whole("logprobs", 0, MOST_LOGPROBS)
    common = _common(given, settings, COMPLETION_TOKENS)
    if echo and logprobs is not None and common["stream"]:
        raise ApiError(400, "echo with logprobs scores the prompt, which cannot be streamed", param="echo")
    given.refuse("suffix", "this model writes at the end only", "")
    given.refuse("best_of", "use n, and choose among the choices", 1, common["n"])
    given.done()
    return CompletionAsk(**common, logprobs=logprobs, prompts=prompts, echo=echo)


def check_model(given: Fields, settings: Settings) -> None:
    """The model a request names has to be the one that is served; no name means that one too."""
    name = given.text("model")
    if name is not None:
        require_model(name, settings)


def require_model(name: str, settings: Settings) -> None:
    """Raise ApiError 404 unless `name` means the model of this server."""
    if name != settings.name and name not in settings.aliases and "*" not in settings.aliases:
        raise ApiError(
            404,
            f"there is no model {name!r:.100} here, this server has {settings.name!r}",
            param="model",
            code="model_not_found",
        )


def _common(given: Fields, settings: Settings, max_tokens: int | None) -> dict[str, Any]:
    stream = given.flag("stream", False)
    options = given.take("stream_options")
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    inner = Fields(options if isinstance(options, dict) else {}, "stream_options.")
    include_usage = inner.flag("include_usage", False)
    inner.ignore("include_obfuscation")
    inner.done()
    given.ignore(*NOTED)
    return {
        "n": given.whole("n", 1, MOST_CHOICES) or 1,
        "max_tokens": given.whole("max_tokens", 1, MOST_TOKENS) or max_tokens,
        "sampling": _sampling(given, settings.sampling),
        "stop": given.strings("stop", MOST_STOPS),
        "stream": stream,
        "include_usage": include_usage,
        "overflow": given.choice("overflow", OVERFLOWS, "error"),
        "deadline": given.seconds("deadline"),
        "grammar": read_guide(given),
        "banned_strings": given.strings("banned_strings", MOST_BANNED),
        "stop_ids": given.wholes("stop_token_ids", MOST_STOP_IDS),
        "stop_loop": _loop(given),
    }


def _loop(given: Fields) -> tuple[int, int] | None:
    pair = given.wholes("stop_loop", 2)
    if pair and (len(pair) != 2 or pair[0] < 1 or pair[1] < 2):
        raise given.wrong("stop_loop", "must be [longest, times], say [32, 4]", list(pair))
    return (pair[0], pair[1]) if pair else None


def _sampling(given: Fields, defaults: SamplingParams) -> SamplingParams:
    values = {name: value for name in SAMPLING if (value := given.take(name)) is not None}
    if isinstance(bias := values.get("logit_bias"), dict):
        try:
            values["logit_bias"] = {int(token): amount for token, amount in bias.items()}
        except ValueError as err:
            raise ApiError(400, "the keys of logit_bias must be token ids", param="logit_bias") from err
    param = next(iter(values)) if len(values) == 1 else None
    try:
        return replace(defaults, **values)
    except UsageError as err:
        named = next((name for name in values if err.problem.startswith(name)), param)
        message = err.problem if err.hint is None else f"{err.problem} ({err.hint})"
        raise ApiError(400, message, param=named) from err


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

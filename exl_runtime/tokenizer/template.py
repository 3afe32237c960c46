"""Chat templates: a list of messages to the exact text the model was trained on.

The template comes with the model and is code: it runs in the sandbox of sandbox.py under a budget. Knows roles and
texts; knows no token ids except to hand the result to the tokenizer it was opened with.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

from jinja2 import meta, nodes
from jinja2.environment import Template
from jinja2.exceptions import TemplateSyntaxError

from ..errors import NoTemplate, TemplateError, UsageError
from . import protect
from .budget import Budget, LimitExceeded
from .files import exists, read_json, read_text
from .messages import fold_system, plain_messages, plain_value
from .sandbox import GuardedEnvironment, Refusal
from .template_args import RESERVED
from .tokenizer import Tokenizer

MAX_SOURCE = 2**16  # characters; the longest public templates have under 20 000
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_NO_TEMPLATE_HINT = (
    "base models have none: generate from plain text instead, or put the chat_template.jinja of the original "
    "instruction-tuned model into the folder"
)
_FOLD_HINT = "this model knows no system role: put the system prompt in front of the first user message (fold_system)"


class ChatTemplate:
    """The chat template of one model, compiled. Immutable, and safe to use from several threads."""

    fold_system = staticmethod(fold_system)

    def __init__(self, sources: Mapping[str, str], tokenizer: Tokenizer | None, *, where: str) -> None:
        """`sources`: name -> Jinja text, "default" among them; `where` names the file in errors. Use `open`."""
        self.source = sources["default"]
        self._sources = dict(sources)
        self._where = where
        self._tokenizer = tokenizer
        self._special = {} if tokenizer is None else tokenizer.special_tokens
        self._codes = {name: _compile(source, where) for name, source in sources.items()}

    @classmethod
    def open(cls, folder: Path | str, tokenizer: Tokenizer | None = None) -> "ChatTemplate":
        """The template of a model folder: chat_template.jinja, else tokenizer_config.json, else chat_template.json.

        Raises TemplateError naming the file when there is none, or it is unreadable or not valid Jinja.
        """
        folder = Path(folder)
        path = folder / "chat_template.jinja"
        if exists(path):
            sources = {"default": read_text(path, TemplateError)}
            for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
                sources[extra.stem] = read_text(extra, TemplateError)
            return cls(sources, tokenizer, where=str(path))
        for name in ("tokenizer_config.json", "chat_template.json"):
            path = folder / name
            value = read_json(path, TemplateError).get("chat_template") if exists(path) else None
            if value is not None:
                return cls(_named(value, path), tokenizer, where=f"{path} (chat_template)")
        raise NoTemplate(f"{folder} has no chat template", hint=_NO_TEMPLATE_HINT)

    @classmethod
    def from_text(
        cls, source: str, tokenizer: Tokenizer | None = None, *, where: str = "the template"
    ) -> "ChatTemplate":
        """A template given as Jinja text."""
        return cls({"default": source}, tokenizer, where=where)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of `messages` ({"role": ..., "content": ...} each), which are not changed.

        tools  JSON schemas of functions; template_args  further variables, such as documents or
        enable_thinking.
        Raises TemplateError with the file, the line and the template's own words, also when it runs away.
        """
        return protect.unmark(self._checked(messages, add_generation_prompt, tools, template_args, None))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """Like `render`, with the token ids. Only what the template itself writes becomes a control token: a message
        that spells one out ("<|end|>") is encoded as ordinary text and cannot end its turn or forge another."""
        if self._tokenizer is None:
            raise UsageError("this template was opened without a tokenizer, so it cannot encode")
        texts = self._tokenizer.control_texts("\0".join(self._sources.values()))
        marked = self._checked(messages, add_generation_prompt, tools, template_args, texts)
        return protect.unmark(marked), self._tokenizer.encode_rendered(marked)

    @property
    def sources(self) -> dict[str, str]:
        """Name -> Jinja text of every template the model brings; "default" is among them."""
        return dict(self._sources)

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """Names of variables that a user may set: those the template reads and does not only make for itself."""
        return tuple(sorted(set().union(*(_settable(tree) for tree in self._trees)) - self._given))

    def unmentioned(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that no template of this model ever reads: to set them has no effect."""
        return tuple(name for name in names if name not in self._read)

    @cached_property
    def _read(self) -> frozenset[str]:
        return frozenset().union(*(meta.find_undeclared_variables(tree) for tree in self._trees))

    @cached_property
    def _trees(self) -> tuple[nodes.Template, ...]:
        env = GuardedEnvironment(Budget.for_input(0))
        return tuple(env.parse(source) for source in self._sources.values())

    @property
    def _given(self) -> frozenset[str]:
        return RESERVED | frozenset(self._special)

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the description of a tool reaches the prompt."""
        probe = {"name": "zq7tool", "description": "zq7tool", "parameters": {"type": "object", "properties": {}}}
        try:
            tools = [{"type": "function", "function": probe}]
            return "zq7tool" in self._render([{"role": "user", "content": "zq7user"}], True, tools, None, None)
        except TemplateError:
            return False

    @cached_property
    def supports_system(self) -> bool:
        """Whether a system message is accepted and reaches the prompt."""
        probe = [{"role": "system", "content": "zq7system"}, {"role": "user", "content": "zq7user"}]
        try:
            return "zq7system" in self._render(probe, True, None, None, None)
        except TemplateError:
            return False

    def _checked(self, messages: Any, generate: bool, tools: Any, extra: Any, controls: Any) -> str:
        try:
            return self._render(messages, generate, tools, extra, controls)
        except TemplateError as err:
            refused = isinstance(err.__cause__, Refusal)
            if refused and any(message.get("role") == "system" for message in messages) and not self.supports_system:
                raise TemplateError(err.problem, hint=_FOLD_HINT) from err.__cause__
            raise

    def _render(self, messages: Any, generate: bool, tools: Any, extra: Any, controls: Any) -> str:
        extra = dict(extra or {})
        if taken := _RESERVED & extra.keys():
            raise UsageError(f"extra template variables cannot be named {', '.join(sorted(taken))}")
        variables = {
            "documents": None,
            **self._special,
            **plain_value(extra, "a template variable"),
            "messages": plain_messages(messages),
            "tools": None if tools is None else plain_value(list(tools), "tools"),
            "add_generation_prompt": bool(generate),
        }
        if controls is not None:
            pattern = protect.control_pattern(controls)
            for name in ("messages", "tools", "documents", *extra):
                variables[name] = protect.mark(variables[name], pattern)
        name = "tool_use" if tools is not None and "tool_use" in self._codes else "default"
        return _run(self._codes[name], variables, self._where)


def _settable(tree: nodes.Template) -> set[str]:
    """What is read from outside. A name that some branch also assigns is the template's own, unless it asks whether
    it is defined: that is how defaults are written."""
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests = (test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined"))
    asked = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
    return {name for name in meta.find_undeclared_variables(tree) if name not in assigned or name in asked}


def _named(value: Any, path: Path) -> dict[str, str]:
    """A chat_template entry is one text, or a list of {"name", "template"}, or an object of names."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for item in value.items() for text in item):
        raise TemplateError(f"{path}: chat_template must be a text or a list of named texts")
    if "default" not in value:
        raise TemplateError(
            f'{path} has chat templates named {", ".join(sorted(value))}, and none of them is "default"',
            hint="copy the one to use into chat_template.jinja",
        )
    return value


def _compile(source: str, where: str) -> CodeType:
    if not source.strip():
        raise TemplateError(f"{where} is empty", hint=_NO_TEMPLATE_HINT)
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"{where} has {len(source)} characters; the limit for a chat template is {MAX_SOURCE}")
    try:
        return GuardedEnvironment(Budget.for_input(0)).compile(source, filename=where)
    except TemplateSyntaxError as err:
        raise TemplateError(f"{where}, line {err.lineno}: {err.message}") from err
    except (RecursionError, MemoryError) as err:
        raise TemplateError(f"{where} is nested too deeply") from err
    except Exception as err:  # Python's compiler on code generated from nonsense: SyntaxError, ValueError, ...
        raise TemplateError(f"{where} is not a usable template: {err}") from err


def _run(code: CodeType, variables: dict[str, Any], where: str) -> str:
    budget = Budget.for_input(_weight(variables))
    env = GuardedEnvironment(budget)
    template = Template.from_code(env, code, env.make_globals(None))
    try:
        chunks, size = [], 0
        for chunk in template.root_render_func(template.new_context(variables)):
            size += len(chunk)
            budget.require(size)
            chunks.append(chunk)
        return "".join(chunks)
    except Refusal as err:
        raise TemplateError(
            f"the chat template refused the conversation: {_words(err)} ({_place(err, template, where)})"
        ) from err
    except LimitExceeded as err:
        raise TemplateError(f"the chat template was stopped: {err} ({_place(err, template, where)})") from err
    except (RecursionError, MemoryError) as err:
        raise TemplateError(f"the chat template was stopped: it recurses or grows too far ({where})") from err
    except Exception as err:  # whatever template code can raise: undefined names, wrong types, ...
        raise TemplateError(
            f"the chat template failed: {type(err).__name__}: {_words(err)} ({_place(err, template, where)})"
        ) from err


def _words(err: BaseException) -> str:
    """What an exception says, on one line of a sane length: the template chose the words."""
    text = " ".join(str(err).split())
    return text if len(text) <= 400 else f"{text[:400]}…"


def _weight(variables: dict[str, Any]) -> int:
    return Budget(value_limit=0, steps=0, memory=sys.maxsize, seconds=0).weigh(variables)


def _place(err: BaseException, template: Template, where: str) -> str:
    """ "file, line N": the innermost template line in the traceback."""
    line = None
    step: TracebackType | None = err.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == where:
            line = template.get_corresponding_lineno(step.tb_lineno)
        step = step.tb_next
    return where if line is None else f"{where}, line {line}"

"""Variables of the chat template that the user sets: which of them the present model reads, and what to say of them."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..tokenizer.template_args import spelled, unmentioned_line
from .settings import TEMPLATE, ReplySettings

if TYPE_CHECKING:
    from ..runtime import Runtime

NOT_SET = "not set"


def read_args(runtime: "Runtime", settings: ReplySettings) -> dict[str, Any]:
    """Those of `template_args` that the model's template reads; the others change nothing."""
    given = settings.template_args
    silent = without_effect(runtime, given)
    return {name: value for name, value in given.items() if name not in silent}


def without_effect(runtime: "Runtime", given: Collection[str]) -> tuple[str, ...]:
    """Names that the template of the model never mentions."""
    template = getattr(runtime, "template", None)
    return template.unmentioned(given) if given and template is not None else ()


def warning(runtime: "Runtime", given: Collection[str]) -> str:
    """One line about names without effect; empty where there are none."""
    silent = without_effect(runtime, given)
    return unmentioned_line(silent) if silent else ""


def rows(runtime: "Runtime", settings: ReplySettings) -> list[tuple[str, str]]:
    """(name as /set takes it, value): what is set, and what else the template reads."""
    known = getattr(getattr(runtime, "template", None), "variables", ())
    names = sorted({*settings.template_args, *known})
    return [(TEMPLATE + name, shown_arg(settings, name)) for name in names]


def shown_arg(settings: ReplySettings, name: str) -> str:
    """The value of one variable as /set takes it."""
    return spelled(settings.template_args[name]) if name in settings.template_args else NOT_SET

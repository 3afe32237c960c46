"""What a template may do with values: operators, filters and methods, each checked before it can grow too big.

Filters and methods not named here are refused. All checks take the environment's `budget`; see budget.py.
"""

import json
import operator
import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedFormatter

from .budget import MAX_INT_BITS, NODE, Budget, LimitExceeded

MAX_WIDTH = 1000  # of padded fields, indents and columns
MAX_SEARCH = 2**31  # characters compared by methods that search naively
_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
OPERATORS = frozenset(_OPERATORS)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PERCENT = re.compile(r"%(?:\([^()]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?[hlL]?(.)", re.DOTALL)
_DIGITS = re.compile(r"\d+")


# operators


def binary(budget: Budget, sign: str, left: Any, right: Any) -> Any:
    """`left sign right`, refused when the result would be too big."""
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if sign == "*" and not numbers:
        for sequence, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(sequence, (str, list, tuple)):
                budget.require(budget.weigh(sequence) * max(times, 0))
    elif sign == "+" and not numbers:
        budget.require(budget.weigh(left) + budget.weigh(right))
    elif sign == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(right, 0) > MAX_INT_BITS:
            raise LimitExceeded(f"it makes a number of more than {MAX_INT_BITS} bits")
    elif sign == "%" and isinstance(left, str):
        _check_percent(budget, left, right)
    return budget.admit(_OPERATORS[sign](left, right))


def _check_percent(budget: Budget, text: str, values: Any) -> None:
    fields, place = 0, text.find("%")
    while place >= 0:
        match = _PERCENT.match(text, place)
        if match is None or match[3] == "(" or "*" in (match[1], match[2]):
            raise SecurityError("this form of % formatting is not allowed in a chat template")
        for number in match.group(1, 2):
            _check_width(int(number[:9]) if number else 0)
        fields += 1
        place = text.find("%", match.end())
    budget.require(len(text) + fields * (MAX_WIDTH + budget.weigh(values)))


def _check_width(width: Any) -> None:
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise LimitExceeded(f"it asks for a width of {width}, the limit is {MAX_WIDTH}")


class _Formatter(SandboxedFormatter):
    """str.format whose fields are charged one by one."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._budget: Budget = env.budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        for number in _DIGITS.findall(format_spec):
            _check_width(int(number[:9]))
        return self._budget.admit(super().format_field(value, format_spec))


# filters


def _text_length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 64


def _check_join(budget: Budget, items: Any, separator: Any) -> None:
    budget.require(budget.weigh(items) + len(items) * _text_length(separator))


def _check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str):
        times = text.count(old) if old else len(text) + 1
        budget.require(len(text) + times * _text_length(new))


def _check_search(text: str, wanted: Any) -> None:
    if isinstance(wanted, str) and len(text) * len(wanted) > MAX_SEARCH:
        raise LimitExceeded("it searches a long text for a long text")


def _pre_join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    items = list(value) if isinstance(value, Iterator) else value
    if hasattr(items, "__len__"):
        _check_join(budget, items, d)
    return items, d, attribute


def _pre_replace(budget: Budget, s: Any, old: Any, new: Any, count: Any = None) -> tuple[Any, ...]:
    _check_replace(budget, s, old, new)
    return s, old, new, count


def _pre_indent(budget: Budget, s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> tuple[Any, ...]:
    _check_width(width)
    if isinstance(s, str):
        pad = len(width) if isinstance(width, str) else MAX_WIDTH if not isinstance(width, int) else width
        budget.require(len(s) + pad * (len(s.splitlines()) + 1))
    return s, width, first, blank


def _pre_width(budget: Budget, value: Any, width: Any = 80) -> tuple[Any, ...]:
    _check_width(width)
    return value, width


def _pre_columns(
    budget: Budget, value: Any, count: Any = None, fill_with: Any = None, *, linecount: Any = None, slices: Any = None
) -> tuple[Any, ...]:
    count = next((n for n in (count, linecount, slices) if n is not None), None)
    _check_width(count)
    budget.require(NODE * MAX_WIDTH + (budget.weigh(fill_with) * MAX_WIDTH if fill_with is not None else 0))
    return value, count, fill_with


def _pre_round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> tuple[Any, ...]:
    if isinstance(precision, int) and abs(precision) > 300:
        raise LimitExceeded(f"it rounds to {precision} digits")
    return value, precision, method


def _pre_int(budget: Budget, value: Any, default: Any = 0, base: Any = 10) -> tuple[Any, ...]:
    if isinstance(value, str) and len(value) > MAX_WIDTH:
        raise LimitExceeded(f"it reads a number of {len(value)} digits")
    return value, default, base


def _pre_trim(budget: Budget, value: Any, chars: Any = None) -> tuple[Any, ...]:
    if isinstance(value, str):
        _check_search(value, chars)
    return value, chars


def _pre_list(budget: Budget, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        budget.require(NODE * len(value))
    return (value,)


# name -> a check that returns the arguments, or None where the result cannot outgrow the input by much
_FILTERS: dict[str, Callable[..., tuple[Any, ...]] | None] = dict.fromkeys(
    _names(
        "abs attr capitalize count d default dictsort e escape filesizeformat first float forceescape groupby items "
        "last length lower map max min random reject rejectattr reverse safe select selectattr sort string title "
        "truncate unique upper urlencode wordcount"
    )
)
_FILTERS |= {
    "batch": _pre_columns,
    "center": _pre_width,
    "indent": _pre_indent,
    "int": _pre_int,
    "join": _pre_join,
    "list": _pre_list,
    "replace": _pre_replace,
    "round": _pre_round,
    "slice": _pre_columns,
    "trim": _pre_trim,
}


def _guarded_filter(name: str, inner: Callable[..., Any], check: Callable[..., tuple[Any, ...]] | None) -> Any:
    kind = getattr(getattr(inner, "jinja_pass_arg", None), "name", None)

    @pass_context  # also keeps the compiler from evaluating the filter on constants, where no budget is running
    @wraps(inner, updated=())
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        env = context.environment
        env.budget.tick()
        if check is not None:
            args, kwargs = check(env.budget, *args, **kwargs), {}
        lead = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (env,)}.get(kind, ())
        return env.received(inner(*lead, *args, **kwargs))

    return run


def _refused_filter(name: str) -> Any:
    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        raise SecurityError(f"the filter {name!r} is not available to chat templates")

    return run


@pass_context
def _sum(context: Context, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """The built-in adds lists in quadratic time."""
    env = context.environment
    total = start
    for item in iterable:
        for part in str(attribute).split(".") if attribute is not None else ():
            item = env.getitem(item, int(part) if part.isdigit() else part)
        total = binary(env.budget, "+", total, item)
    return total


@pass_context
def _format(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    return binary(context.environment.budget, "%", str(value), kwargs or args)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as model authors wrote it when they trained: no HTML escapes, non-ASCII kept."""
    budget: Budget = context.environment.budget
    for text in (indent, *(separators or ())):
        _check_width(len(text) if isinstance(text, str) else text)
    budget.tick()
    budget.weigh(value)
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    if indent is None:
        return budget.admit(encoder.encode(value))
    chunks = []
    for chunk in encoder.iterencode(value):
        budget.allocate(len(chunk))
        chunks.append(chunk)
    return budget.admit("".join(chunks))


def guarded_filters() -> dict[str, Callable[..., Any]]:
    """Every built-in filter under its name: guarded, replaced, or refusing."""
    table = {name: _refused_filter(name) for name in FILTERS}
    table |= {name: _guarded_filter(name, FILTERS[name], check) for name, check in _FILTERS.items() if name in FILTERS}
    return table | {"sum": _sum, "format": _format, "tojson": _tojson}


# methods

_SAFE_METHODS: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    range: frozenset({"count", "index"}),
    int: frozenset({"bit_length", "is_integer"}),
    float: frozenset({"is_integer"}),
}
_NAIVE_SEARCH = frozenset({"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"})


def check_method(env: Any, owner: Any, name: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Refuse a built-in method or too big a call of it; the callable to use in its place, or None for itself."""
    allowed = next((names for kind, names in _SAFE_METHODS.items() if isinstance(owner, kind)), frozenset())
    if name not in allowed:
        raise SecurityError(f"{type(owner).__name__}.{name} is not available to chat templates")
    if not isinstance(owner, str):
        return None
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_width(args[0] if args else 8)
        if name == "expandtabs":
            env.budget.require(len(owner) + owner.count("\t") * MAX_WIDTH)
    elif name == "join" and args:
        items = args[0] if hasattr(args[0], "__len__") else list(args[0])
        _check_join(env.budget, items, owner)
        return lambda iterable: owner.join(items)
    elif name == "replace" and len(args) >= 2:
        _check_replace(env.budget, owner, args[0], args[1])
    elif name in _NAIVE_SEARCH and args:
        _check_search(owner, args[0])
    elif name == "format":
        return lambda *values, **named: _Formatter(env).vformat(str(owner), values, named)
    return None

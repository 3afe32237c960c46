"""A Jinja environment in which a hostile template can neither reach Python nor run away with time or memory.

On top of Jinja's immutable sandbox: only known callables may be called, every new value is checked against a
budget, and compiled code pays for each loop turn. One environment serves one rendering; code is compiled once.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from .budget import Budget, LimitExceeded
from .operations import OPERATORS, binary, check_method, guarded_filters

MAX_DEPTH = 64  # calls of macros and recursive loops inside each other
_FILTERS = guarded_filters()
_METHODS = {Cycler: ("next", "reset"), LoopContext: ("cycle", "changed")}


class Refusal(Exception):
    """The template called raise_exception."""


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks what the model wrote, for training; here it is only a scope."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without private names, and with a text that does not spell out its contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


class _Code(CodeGenerator):
    """Emits calls that check what Jinja itself would do inline."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick()"), lineno=node.lineno))
        if node.test is not None:  # turns that the condition skips never reach the body
            each = nodes.EnvironmentAttribute("each", lineno=node.lineno)
            node.iter = nodes.Call(each, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        text = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if text:
            self.writeline(f"environment.allocate({text})", node)
        super().visit_Output(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._checked(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._checked(super().visit_Compare, node, frame)

    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:
        self._checked(super().visit_Test, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._checked(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _checked(self, visit: Any, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.received(")
        visit(node, frame)
        self.write(")")


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Methods without a leading underscore that Jinja does not define are called by compiled code."""

    code_generator_class = _Code
    intercepted_binops = OPERATORS

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=(_GenerationTag, loopcontrols),
            optimized=False,  # constants are not worked out while compiling, where no budget is running
            finalize=_finalize,
        )
        self.budget = budget
        self.tick = budget.tick
        self.allocate = budget.allocate
        self._depth = 0
        self.filters = _FILTERS
        self.globals = {
            "range": self.globals["range"],
            "cycler": Cycler,
            "joiner": Joiner,
            "namespace": _Namespace,
            "dict": _DictMaker(self),
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = {id(function) for function in self.globals.values()}

    def received(self, value: Any) -> Any:
        """Check a new value; an iterator is checked item by item as it is read."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.each(value)
        return self.budget.admit(value)

    def each(self, iterable: Iterable[Any]) -> Iterator[Any]:
        return (self.budget.admit(item) for item in iterable)

    def joined(self, context: Context, parts: tuple[Any, ...]) -> str:
        """The ~ operator."""
        self.budget.require(sum(map(self.budget.weigh, parts)))
        return self.budget.admit((markup_join if context.eval_ctx.autoescape else str_join)(parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return binary(self.budget, operator, left, right)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        return super().call_test(*args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> None:
        """Formatting methods stay what they are here; `call` is the only way to run one, and handles them."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        if isinstance(obj, MethodType) and obj.__self__ is self:  # only compiled code can name it
            return obj(*args)
        obj = self._callable(obj, args)
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise LimitExceeded(f"macros call each other more than {MAX_DEPTH} deep")
            return self.received(super().call(context, obj, *args, **kwargs))
        finally:
            self._depth -= 1

    def _callable(self, obj: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(obj, (Undefined, Macro, LoopContext, Joiner, BlockReference)) or id(obj) in self._functions:
            return obj
        if isinstance(obj, (BuiltinMethodType, MethodType)):
            owner, name = obj.__self__, obj.__name__
            if isinstance(owner, _DictMaker) or name in _METHODS.get(type(owner), ()):
                return obj
            return check_method(self, owner, name, args) or obj
        raise SecurityError(f"a chat template cannot call {type(obj).__name__}")


class _DictMaker:
    """The `dict` of templates: not the class, through which Python could be reached."""

    def __init__(self, env: GuardedEnvironment) -> None:
        self._env = env

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        if len(args) > 1:
            raise TypeError(f"dict expected at most 1 argument, got {len(args)}")
        made = {}
        for source in args:
            for key, value in source.items() if isinstance(source, dict) else source:
                self._env.tick()
                made[key] = value
        return made | kwargs

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        made = {}
        for key in keys:
            self._env.tick()
            made[key] = value
        return made


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    return context.environment.budget.admit(value)


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message))


def _strftime_now(format: Any) -> str:
    if not isinstance(format, str) or len(format) > 200 or any(char.isdigit() for char in format):
        raise SecurityError("strftime_now takes a short format without digits")
    return datetime.now().strftime(format)

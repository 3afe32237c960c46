"""Metrics of the user's own: `module:function`, given on the command line and nowhere else.

The function is `function(prediction: str, answers: list[str], task: dict) -> float`; `task` is the line of the suite.
"""

import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from exl_runtime.console.progress import printable
from exl_runtime.errors import EvalError, UsageError

from .suite import Task

Metric = Callable[[str, list[str], dict[str, Any]], float]
_HINT = (
    "wanted: function(prediction, answers, task) -> float, as module:function, the module in this folder or installed"
)


def load_metric(name: str) -> Metric:
    """The function `module:function` names; the working directory counts as a place of modules. Raises UsageError."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise UsageError(f"--metric {printable(name, 80)}: not of the form module:function", hint=_HINT)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(import_module(module_name), function_name)
    except AttributeError:
        raise UsageError(f"--metric {name}: the module has no {function_name}", hint=_HINT) from None
    except KeyboardInterrupt:
        raise
    except BaseException as err:  # whatever the module does when it is imported, SystemExit included
        raise UsageError(f"--metric {name}: cannot be imported: {_told(err)}", hint=_HINT) from err
    if not callable(function):
        raise UsageError(f"--metric {name}: {function_name} is no function", hint=_HINT)
    return function


def apply(name: str, metric: Metric, reply: str, task: Task) -> float:
    """One score. Raises EvalError that names metric and task for an exception, and for what is no finite number."""
    where = f'--metric {name}: task "{printable(task.id, 60)}"'
    try:
        score = metric(reply, task.texts, dict(task.source))
        value = float(score)
    except Exception as err:
        raise EvalError(f"{where}: {_told(err)}", hint="the fault is in the metric, not in this program") from err
    if not math.isfinite(value):
        raise EvalError(f"{where}: the score is {value}", hint="a score is a finite number")
    return value


def _told(err: BaseException) -> str:
    return printable(f"{type(err).__name__}: {err}", 200)

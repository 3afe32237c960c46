"""Hostile templates end in TemplateError, soon and without eating memory, on any thread."""

import resource
import threading
import time
from pathlib import Path

import pytest

from exl_runtime.errors import TemplateError
from exl_runtime.tokenizer import budget
from exl_runtime.tokenizer.template import MAX_SOURCE, ChatTemplate

MESSAGES = [{"role": "user", "content": "hello " * 50}]
GROW = "{% set n = namespace(a=START) %}{% for i in range(64) %}{% set n.a = STEP %}{% endfor %}"
COLLIDING = "range(0, (2**61 - 1) * 99999, 2**61 - 1)"  # whole numbers that all have hash 0


def grow(start: str, step: str, end: str = "") -> str:
    return GROW.replace("START", start).replace("STEP", step) + end


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']() }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].clear() }}",
    "{{ messages[0].pop('role') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x[0]}'.format_map({}) }}",
    "{{ dict.fromkeys.__func__.x }}",
    "{{ {}.fromkeys([1]) }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ self._TemplateReference__context.x }}",
    "{{ lipsum() }}",
    "{{ 'x'|urlize }}",
    "{{ 'x'.encode() }}",
    "{{ 'x'.translate({120: 'y'}) }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ joiner.__class__('x', (), {}) }}",
    "{{ (messages|map('upper')).gi_frame.x }}",
    "{% import 'os' as os %}",
]
BOMBS = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ ('x' * 10**6) * 10**6 }}",
    "{{ [1] * 10**10 }}",
    "{{ (1,) * 10**10 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ (10**1000) ** 10 }}",
    "{{ range(99999)|sum(start=2**4000) * 2**4000 * 2**4000 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%((a))999999999s' % {'(a)': 1} }}",
    "{{ '%1000000000s'|format('x') }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(10**9) }}",
    "{{ 'a\nb'|indent(10**9) }}",
    "{{ ('a\n' * 100000)|indent('x' * 100000) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ 1.5|round(10**9, 'ceil') }}",
    "{{ ('9' * 1000000)|int }}",
    "{{ ('y' * 100000).join('x' * 100000) }}",
    "{{ ('x' * 100000)|join('y' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('a' * 2000000).rfind('b' + 'a' * 1000000) }}",
    "{{ ('a' * 2000000).strip('b' * 1000000 + 'a') }}",
    "{{ ('a' * 2000000)|trim('b' * 1000000 + 'a') }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ ([[1] * 100] * 1000)|sum(start=[])|length / 0 }}",
    "{{ strftime_now('%999999999Y') }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    grow("'x'", "n.a ~ n.a"),
    grow("'x'", "n.a + n.a"),
    grow("[1]", "[n.a, n.a]", "{{ n.a }}"),
    grow("[1]", "{'a': n.a, 'b': n.a}", "{{ n.a|tojson }}"),
    grow("(1,)", "(n.a, n.a)", "{{ n.a == n.a }}"),
    "{% set n = namespace(a=()) %}{% for i in range(9999) %}{% set n.a = (n.a,) %}{% endfor %}{{ {n.a: 1} }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'y' * 100000 }}{% endfor %}{% endset %}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'y' * 100000 }}{% endfor %}{% endfilter %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endfor %}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999)|select('string')|list %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|map('abs')|list|length }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|map(attribute='real.' * 5000 + 'real')|list|length }}{% endfor %}",
    "{% set a = range(99999)|list %}{% for i in range(99999) %}{{ a == a|list }}{% endfor %}",
    f"{{{{ {COLLIDING}|unique|list }}}}",
    f"{{{{ dict.fromkeys({COLLIDING}) }}}}",
]
SOURCES = [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ " + "-" * 20_000 + "1 }}",
    "{{ " + "1+" * 20_000 + "1 }}",
    "{{ a" + ".a" * 20_000 + " }}",
    "{{ " + "not " * 10_000 + "1 }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{% if a %}" + "{% elif b %}" * 5000 + "{% endif %}",
    "{% for i in x %}" * 60 + "{% endfor %}" * 60,
    "{{ " + "9" * 50_000 + " }}",
    "x" * (MAX_SOURCE + 1),
    "{#" * 20_000,
]


def refusal(source: str) -> str:
    started = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate.from_text(source).render(MESSAGES)
    assert time.thread_time() - started < 10  # 3 s by design
    return caught.value.problem


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out(source: str) -> None:
    refusal(source)


def test_no_way_out_by_printing() -> None:
    """What is unsafe prints as nothing, as in transformers."""
    for source in ("{{ ''|attr('__class__') }}", "{{ (1).__class__ }}", "{{ dict.__class__ }}", "{{ range.__doc__ }}"):
        assert ChatTemplate.from_text(source).render(MESSAGES) == ""


def test_bombs_are_defused_in_bounded_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in BOMBS:
        refusal(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_work_meets_the_deadline(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(weight: int) -> budget.Budget:
        return budget.Budget(value_limit=2**22, steps=2**40, memory=2**40, seconds=0.3)

    monkeypatch.setattr(budget.Budget, "for_input", staticmethod(hurried))
    started = time.thread_time()
    assert "longer than" in refusal(source)
    assert time.thread_time() - started < 3


def test_step_limit_does_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.time, "thread_time", lambda: 0.0)
    with pytest.raises(TemplateError, match="too many steps"):
        ChatTemplate.from_text(ENDLESS[0]).render(MESSAGES)


def test_nesting_is_bounded_before_python_has_to_walk_it() -> None:
    """Hashing a deeply nested tuple would overflow the C stack."""
    build = "{% set n = namespace(a=()) %}{% for i in range(LEVELS) %}{% set n.a = (n.a,) %}{% endfor %}"
    deep = build + "{{ {n.a: 1}|length }}"
    assert ChatTemplate.from_text(deep.replace("LEVELS", "50")).render(MESSAGES) == "1"
    assert "nests values" in refusal(deep.replace("LEVELS", "300"))


@pytest.mark.parametrize("source", SOURCES)
def test_sources_that_break_parsers(source: str) -> None:
    refusal(source)


def test_on_another_thread() -> None:
    problems: list[str] = []
    sources = [BOMBS[0], BOMBS[-1], "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", SOURCES[0], SOURCES[6]]
    thread = threading.Thread(target=lambda: problems.extend(map(refusal, sources)))
    thread.start()
    thread.join(60)
    assert len(problems) == len(sources)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("\n{% for i in range(99999) %}{{ 'x' * 10**9 }}{% endfor %}")
    template = ChatTemplate.open(tmp_path)
    with pytest.raises(TemplateError, match=r"chat_template\.jinja, line 2"):
        template.render(MESSAGES)


def test_an_honest_long_conversation_passes() -> None:
    source = (
        "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s + m.content|trim + '|' %}{% endfor %}"
        "{{ n.s }}"
    )
    messages = [{"role": "user", "content": "word " * 100}] * 2000
    assert len(ChatTemplate.from_text(source).render(messages)) == 2000 * 500

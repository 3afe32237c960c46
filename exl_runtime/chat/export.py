"""A conversation for other programs and for people: Markdown, JSON, one HTML page. Text in, text out.

The page shows what a model wrote, and nobody checked that: HTML in it is text, pictures and scripts are left out, and
a content security policy forbids the browser to load anything.
"""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from markdown_it import MarkdownIt

from .turn import Turn

FORMATS = ("md", "json", "html")
NAMES = {"user": "You", "assistant": "Model"}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.2rem}h2{font-size:.9rem;color:#777;margin:1.5rem 0 .2rem}.user{background:#f2f4f8}"
    "article{padding:.1rem .8rem;border-radius:.5rem}pre{background:#f6f6f6;padding:.6rem;overflow:auto}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}.user{background:#26282e}pre{background:#222}}"
)


def export(
    kind: str,
    turns: Sequence[Turn],
    *,
    system: str | None,
    model: str,
    settings: dict[str, object],
    parts: Callable[[Turn], tuple[str, str]] = lambda turn: ("", turn.content),
) -> str:
    """The conversation as a document of one of FORMATS. parts: thoughts and answer of a turn."""
    if kind == "json":
        messages: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            thoughts, answer = parts(turn)
            message: dict[str, object] = {"role": turn.role, "content": answer}
            message |= {"reasoning_content": thoughts} if thoughts else {}
            messages.append(message | ({} if turn.meta is None else {"meta": asdict(turn.meta)}))
        document = {"model": model, "settings": settings, "messages": messages}
        return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    spoken = [] if system is None else [("System", "system", "", system)]
    spoken += [(NAMES[turn.role], turn.role, *parts(turn)) for turn in turns]
    if kind == "md":
        sections = [f"## {name}\n\n{_quoted(thoughts)}{text.rstrip()}\n" for name, _, thoughts, text in spoken]
        return "\n".join([f"# Chat with {model}\n", *sections])
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")
    title = f"Chat with {html.escape(model)}"
    body = "".join(
        f'<h2>{name}</h2>\n<article class="{role}">\n{_folded(thoughts)}{markdown.render(text)}</article>\n'
        for name, role, thoughts, text in spoken
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}</body></html>\n"
    )


def _quoted(thoughts: str) -> str:
    """As a quotation before the answer."""
    return "".join(f"> {line}".rstrip() + "\n" for line in thoughts.splitlines()) + "\n" if thoughts else ""


def _folded(thoughts: str) -> str:
    """As a fold that a click opens."""
    return f"<details><summary>Thoughts</summary><pre>{html.escape(thoughts)}</pre></details>\n" if thoughts else ""

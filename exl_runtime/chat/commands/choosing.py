"""Commands about how tokens are chosen: settings, presets, bans, biases, and what the model thought of its reply."""

import math
import shlex
from collections.abc import Iterable
from dataclasses import replace

from ...errors import UsageError
from .. import presets, probabilities, status, variables
from ..continuing import reply_ids
from ..settings import TEMPLATE, ReplySettings, change, full_name, get_setting, setting_names, shown
from .base import Command, Conversation

GROUP = "model"
NONE = ("none", "off")
IDS = ("logit_bias", "banned_tokens", "allowed_tokens", "stop_ids")  # settings that name tokens by number
TOP = 3  # alternatives that /probs shows


def _set(chat: Conversation, rest: str) -> None:
    settings = chat.session.settings
    if not rest:
        default = ReplySettings()
        rows = []
        for name in setting_names():
            value, usual = shown(get_setting(settings, name)), shown(get_setting(default, name))
            rows.append((name, value, "" if value == usual else f"default {usual}"))
        chat.screen.table(rows + [(*row, "") for row in variables.rows(chat.session.runtime, settings)])
        return
    name, value = _name_and_value(rest)
    if full_name(name).startswith(TEMPLATE):
        _set_variable(chat, full_name(name), value)
        return
    if not value:
        name = full_name(name)
        chat.screen.show(f"{name} = {shown(get_setting(settings, name))}")
        return
    name = full_name(name)
    changed = change(settings, name, value)
    if name in IDS:
        _known(chat, get_setting(changed, name))
    chat.session.settings = changed
    chat.screen.notice(f"{name} = {shown(get_setting(chat.session.settings, name))}")
    if name in ("guidance", "negative") and (note := _leading(changed)):
        chat.screen.notice(note)


def _set_variable(chat: Conversation, name: str, value: str) -> None:
    session, variable = chat.session, name.removeprefix(TEMPLATE)
    if value:
        session.settings = change(session.settings, name, value)
    now = variables.shown_arg(session.settings, variable)
    said = f"{name} is not set: the template decides" if now == variables.NOT_SET else f"{name} = {now}"
    (chat.screen.notice if value else chat.screen.show)(said)
    is_set = bool(value) and variable in session.settings.template_args
    if is_set and (note := variables.warning(session.runtime, [variable])):
        chat.screen.warning(note)


def _leading(settings: ReplySettings) -> str:
    """What guidance and negative do together, where that may not be what was meant."""
    if settings.guidance == 1 and settings.negative:
        return "it takes effect with a guidance above 1: /set guidance 1.5"
    if settings.guidance != 1 and not settings.negative:
        return "away from what would be said without the system prompt (/set negative TEXT: under another one)"
    return ""


def _name_and_value(text: str) -> tuple[str, str]:
    name, _, value = text.partition(" ")
    if "=" in name:
        name, _, start = name.partition("=")
        value = f"{start} {value}"
    return name, value.strip().removeprefix("=").strip()


def _seed(chat: Conversation, rest: str) -> None:
    _set(chat, f"seed {'none' if rest.lower() in (*NONE, 'random') else rest}".strip())


def _sampler(chat: Conversation, rest: str) -> None:
    chain = chat.session.settings.sampling.effective_chain()
    chat.screen.table([(str(number), step) for number, step in enumerate(chain, 1)], title="steps, in this order")


def _preset(chat: Conversation, rest: str) -> None:
    word, _, name = rest.partition(" ")
    name = name.strip()
    settings = chat.session.settings
    if not rest:
        rows = [(known, "yours", "") for known in presets.saved()]
        rows += [(known, about, "") for known, (about, _) in presets.BUILT_IN.items()]
        chat.screen.table(rows)
    elif word == "save" and name:
        presets.save(name, settings.sampling)
        chat.screen.notice(f"the sampling settings are kept as preset {name}")
    elif word in ("delete", "remove") and name:
        presets.delete(name)
        chat.screen.notice(f"preset {name} is gone")
    else:
        chat.session.settings = replace(settings, sampling=presets.apply(rest, settings.sampling))
        chat.screen.notice(f"preset {rest}; /sampler shows what it does, /set changes it")


def _ban(chat: Conversation, rest: str) -> None:
    settings = chat.session.settings
    tokens, texts = settings.sampling.banned_tokens, settings.banned_strings
    if rest.lower() in NONE:
        tokens, texts = (), ()
    for word in _words(rest) if rest.lower() not in NONE else ():
        single = _single(chat, word)
        tokens = tuple(dict.fromkeys([*tokens, *single]))
        texts = texts if single else tuple(dict.fromkeys([*texts, word]))
    sampling = replace(settings.sampling, banned_tokens=tokens)
    chat.session.settings = replace(settings, sampling=sampling, banned_strings=texts)
    piece = chat.session.runtime.tokenizer.piece
    rows = [(str(token), repr(piece(token))[1:-1]) for token in tokens] + [("text", repr(text)[1:-1]) for text in texts]
    if rows:
        chat.screen.table(rows, title="never in a reply")
    else:
        chat.screen.notice("nothing is banned")


def _bias(chat: Conversation, rest: str) -> None:
    settings = chat.session.settings
    biases = dict(settings.sampling.logit_bias)
    if rest.lower() in NONE:
        biases = {}
    for word in _words(rest) if biases or rest.lower() not in NONE else ():
        token, separator, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            separator, value = "", 0.0
        if not separator:
            raise UsageError(f"{word!r:.60} is not TOKEN=NUMBER", hint="for example /bias 'Paris=2 42=-5', /bias none")
        for id in _token_ids(chat, token):
            biases[id] = value
    biases = {token: value for token, value in biases.items() if value}
    chat.session.settings = replace(settings, sampling=replace(settings.sampling, logit_bias=biases))
    if not biases:
        chat.screen.notice("no token has a bias")
        return
    piece = chat.session.runtime.tokenizer.piece
    chat.screen.table([(str(token), repr(piece(token))[1:-1], f"{value:+g}") for token, value in biases.items()])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as err:
        raise UsageError(f"{text!r:.60} has a quote that is not closed") from err


def _single(chat: Conversation, word: str) -> list[int]:
    """The token with this number; or those that a word is, with and without a blank before it; [] if it is several."""
    tokenizer = chat.session.runtime.tokenizer
    if word.isdecimal():
        _known(chat, [int(word)])
        return [int(word)]
    if not word:
        raise UsageError("an empty text is no token")
    ways = [tokenizer.encode(text, parse_special=False) for text in (word, f" {word}")]
    return list(dict.fromkeys(way[0] for way in ways if len(way) == 1))


def _known(chat: Conversation, ids: Iterable[int]) -> None:
    """Raise UsageError for a number that is no token of the model."""
    size = chat.session.runtime.tokenizer.vocab_size
    for token in ids:
        if token >= size:
            raise UsageError(f"there is no token {token}", hint=f"ids go from 0 to {size - 1}")


def _token_ids(chat: Conversation, word: str) -> list[int]:
    single = _single(chat, word)
    if not single:
        tokenizer = chat.session.runtime.tokenizer
        pieces = [repr(tokenizer.piece(token))[1:-1] for token in tokenizer.encode(word, parse_special=False)]
        raise UsageError(
            f"{word!r:.60} is not one token but {len(pieces)}: {' '.join(pieces):.200}",
            hint="name a single token, by its text or its number; /tokens TEXT shows numbers",
        )
    return single


def _probs(chat: Conversation, rest: str) -> None:
    if rest and not rest.isdecimal():
        raise UsageError(f"{rest!r:.60} is not a number of alternatives", hint="for example /probs 5")
    top = int(rest) if rest else TOP
    tokens = _measured(chat, max(1, top))
    piece = chat.session.runtime.tokenizer.piece
    rows = []
    for token in tokens:
        others = [(id, value) for id, value in token.top if id != token.id][:top]
        better = "  ".join(f"{repr(piece(id))[1:-1]} {math.exp(value):.1%}" for id, value in others)
        rows.append((repr(piece(token.id))[1:-1], f"{math.exp(token.logprob):.1%}", better))
    chat.screen.table(rows, title="token, its probability, what else was likely")
    _say_perplexity(chat, tokens)


def _ppl(chat: Conversation, rest: str) -> None:
    _say_perplexity(chat, _measured(chat, 1))


def _measured(chat: Conversation, top: int) -> list:
    session = chat.session
    messages = session.seen_messages
    if not session.turns or session.turns[-1].role != "assistant":
        raise UsageError("there is no reply to look at", hint="say something first")
    prompt = session.runtime.render(messages[:-1], template_args=session.template_args).ids
    reply = reply_ids(session.tree.path()[-1], session.voice, session.runtime.tokenizer)
    tokens = probabilities.reply_logprobs(session.runtime, prompt, reply, top + 1)
    if not tokens:
        raise UsageError("the last reply is empty")
    return tokens


def _say_perplexity(chat: Conversation, tokens: list) -> None:
    chat.screen.notice(f"perplexity {probabilities.perplexity(tokens):.2f} over {status.count(len(tokens))} tokens")


COMMANDS = (
    Command(
        "set",
        "/set [NAME [VALUE]]",
        "show or change how replies are made; template.NAME: a variable of the chat template",
        GROUP,
        _set,
    ),
    Command("seed", "/seed [N | none]", "make replies repeatable, or not", GROUP, _seed),
    Command(
        "preset",
        "/preset [NAME | save NAME | delete NAME]",
        "use, keep or list sets of sampling settings",
        GROUP,
        _preset,
    ),
    Command("sampler", "/sampler", "the steps that choose a token, as they are set", GROUP, _sampler),
    Command("ban", "/ban [TOKEN | TEXT.. | none]", "tokens and texts that never appear in a reply", GROUP, _ban),
    Command("bias", "/bias [TOKEN=NUMBER.. | none]", "make tokens more or less likely", GROUP, _bias),
    Command("probs", "/probs [N]", "the probability of every token of the last reply, and N others", GROUP, _probs),
    Command("ppl", "/ppl", "the perplexity of the last reply", GROUP, _ppl),
)

"""One exchange on a screen: the events of a reply become text, notices and a status line. Knows no commands."""

from collections.abc import Iterator

from ..errors import ExlError
from ..generation.request import Result
from ..generation.stream import Dropped, Event, Finished, Started, Text
from . import status
from .interrupts import gentle_interrupt
from .screen import Screen
from .session import ChatSession
from .thinking import Mode, thoughts_of


def show_reply(
    session: ChatSession, events: Iterator[Event], screen: Screen, thinking: Mode = "show"
) -> tuple[Result | None, bool]:
    """Run a reply to its end and say what it took. An ExlError is shown, not raised: the conversation goes on.
    thinking: what becomes of thoughts on the screen.

    The result is None when there is none: it failed, or was stopped before a word. The flag says that Ctrl-C was used.
    """
    reply = screen.reply()
    result: Result | None = None
    problem: ExlError | None = None
    spoken = said = False
    forgotten = len(session.forgotten)
    dropped = 0
    thoughts = thoughts_of(session, thinking)
    with gentle_interrupt(session.cancel) as interrupted:
        try:
            for event in events:
                if isinstance(event, Started):
                    reply.waiting(f"reading {status.count(event.prompt_tokens - event.reused_tokens)} tokens …")
                elif isinstance(event, Text) and event.text:
                    spoken = True
                    if text := thoughts.push(event.text):
                        reply.text(text)
                        said = True
                    elif thoughts.thinking and not said:
                        reply.waiting(f"thinking … {status.count(thoughts.words)} words")
                elif isinstance(event, Dropped):
                    dropped += event.tokens
                elif isinstance(event, Finished):
                    result = event.result
        except KeyboardInterrupt:  # the second one: no more waiting for the present step
            pass
        except ExlError as err:
            problem = err
    if text := thoughts.finish():
        reply.text(text)
        said = True
    if said or (not spoken and result is not None and result.stop_reason not in ("cancelled", "deadline")):
        reply.finish()
    else:
        reply.discard()
    if dropped:
        screen.warning(status.dropped_notice(session.forgotten[forgotten:], dropped))
    if problem is not None:
        screen.error(str(problem))
    elif not spoken and (result is None or result.stop_reason in ("cancelled", "deadline")):
        screen.notice("stopped before the first word: the conversation is as it was before")
        result = None
    elif result is None:  # insisted: what was said is kept, its numbers are not known
        screen.notice("stopped; what was said is kept")
    else:
        context = session.runtime.info.context
        if thoughts.words and thinking == "fold":
            screen.notice(f"thought for {status.count(thoughts.words)} words (/think show)")
        screen.notice(status.status_line(result, context))
        if warning := status.fullness_warning(result, context, session.settings.overflow):
            screen.warning(warning)
    return result, interrupted()

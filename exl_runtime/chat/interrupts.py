"""The keyboard while a reply is made: Ctrl-C asks it to end in good order, a second one insists; other keys wait.

Knows signals and terminal modes, nothing of replies.
"""

import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def gentle_interrupt(cancel: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT calls `cancel`, every further one raises KeyboardInterrupt.

    Yields a function that says whether there was one. Outside the main thread, where Python takes no signal handlers,
    nothing changes. `cancel` must be safe in a signal handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        cancel()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Within the block keys are not echoed (into the middle of the reply) but kept for the next prompt."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    quiet = [*before[:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

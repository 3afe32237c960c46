"""The keyboard while a reply is made: Ctrl-C or Esc asks it to end, a second Ctrl-C insists; other keys wait.

Knows signals and terminal modes, nothing of replies.
"""

import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ESC = b"\x1b"
ESC_SECONDS = 0.05  # what belongs to one key comes at once


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
def quiet_keyboard(escape: Callable[[], None]) -> Iterator[bytearray]:
    """Within the block keys are not echoed (into the middle of the reply); Esc alone calls `escape`.

    Yields the other keys that were pressed, for the next prompt; complete after the block. `escape` must be safe to
    call from another thread.
    """
    keys = bytearray()
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield keys
        return
    quiet = [*before[:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    wake, stop = os.pipe()
    watcher = threading.Thread(target=_watch, args=(descriptor, wake, keys, escape), daemon=True)
    watcher.start()
    try:
        yield keys
    finally:
        os.close(stop)
        watcher.join()
        os.close(wake)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _watch(descriptor: int, wake: int, keys: bytearray, escape: Callable[[], None]) -> None:
    """Read keys until the other end of `wake` is closed. An arrow key begins with the byte of Esc, but goes on."""
    while True:
        ready, _, _ = select.select([descriptor, wake], [], [])
        if wake in ready:
            return
        try:
            data = os.read(descriptor, 1024)
            if data == ESC and select.select([descriptor], [], [], ESC_SECONDS)[0]:
                data += os.read(descriptor, 1024)
        except OSError:  # the terminal is gone
            return
        if not data:
            return
        if data == ESC:
            escape()
        else:
            keys += data

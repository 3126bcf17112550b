"""Ctrl-C and SIGTERM: they end a run cleanly, or wait until its folder is whole."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end a run cleanly; gives a function that says whether one of them came.

    They raise KeyboardInterrupt, so that a long round ends at once. Python drops an exception that is
    raised in some places, such as a finaliser; so the loop asks as well.
    """
    came = False

    def stop(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    with signals(stop):
        yield lambda: came


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C waits until the folder is whole."""
    with signals(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def signals(handler: Any) -> Iterator[None]:
    """Handle SIGINT and SIGTERM so for a while; only a program's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

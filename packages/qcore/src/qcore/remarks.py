"""What a solver or observer wants to say about the weight at hand, without knowing who listens: it ends up in the report."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger("qcore")
_listening: ContextVar[list[str] | None] = ContextVar("remarks", default=None)


def remark(text: str) -> None:
    """Say something that a user should know of this weight, though it is no error.  Where nobody listens, it is logged as a warning."""
    heard = _listening.get()
    if heard is None:
        log.warning(text)
    elif text not in heard:
        heard.append(text)


@contextmanager
def listening() -> Iterator[list[str]]:
    """The remarks made inside, each once."""
    heard: list[str] = []
    token = _listening.set(heard)
    try:
        yield heard
    finally:
        _listening.reset(token)

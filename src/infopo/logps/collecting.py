"""What forward passes leave behind besides log-probs, where somebody around them asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Collector(Generic[T]):
    """Something that forward passes add to, within a block that asks for it.

    Args:
        name: Name for debuggers.

    Example:
        >>> collector = Collector[list[int]]("numbers")
        >>> with collector.into([]) as found:
        ...     collector.current.append(1)
        >>> found, collector.current
        ([1], None)
    """

    def __init__(self, name: str) -> None:
        self._current: ContextVar[T | None] = ContextVar(name, default=None)

    @property
    def current(self) -> T | None:
        """What the next forward pass adds to, or None if nobody asks."""
        return self._current.get()

    @contextmanager
    def into(self, found: T, wanted: bool = True) -> Iterator[T]:
        """Within it, forward passes add to `found`, if that is wanted."""
        token = self._current.set(found if wanted else None)
        try:
            yield found
        finally:
            self._current.reset(token)

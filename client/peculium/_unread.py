"""Values that are read when somebody looks at them: of what the ledger answers, most is never looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar


class Unread:
    """A frozen dataclass with slots whose fields may be set later."""

    __slots__ = ("_read",)

    if not TYPE_CHECKING:  # A type checker would take any name at all for a field.

        def __getattr__(self, name: str) -> object:
            """Called for what is not there (yet)."""
            fields = type(self).__dataclass_fields__
            if name not in fields:
                problem = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(problem, name=name, obj=self)
            read = self._read()
            for each in fields:
                object.__setattr__(self, each, getattr(read, each))
            return getattr(read, name)


_U = TypeVar("_U", bound=Unread)


def unread(cls: type[_U], read: Callable[[], _U]) -> _U:
    """A value that is what `read` returns, which is called when one of its fields is asked for."""
    value = cls.__new__(cls)
    object.__setattr__(value, "_read", read)
    return value

"""The one exception that a user can cause."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: says what we got, what was expected, and how to fix it.

    Raised anywhere, never caught on the way; `__main__` prints its message without a traceback and exits with 2.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist: lists those that do, nearest first."""
    options = list(known)
    near = difflib.get_close_matches(name, options, n=len(options) or 1, cutoff=0.4)
    ordered = near + sorted(option for option in options if option not in near)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"Unknown {kind} {name!r}.{guess} There are: {', '.join(ordered) or 'none'}.")


def user_error_in(error: BaseException | None) -> UserError | None:
    """The UserError behind an exception that a library wrapped, found through `__cause__` and `__context__`."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None

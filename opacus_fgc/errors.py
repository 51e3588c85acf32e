"""What tells a refusal for the sake of privacy from any other error, and how an error gets the name of a layer."""

from __future__ import annotations


class PrivacyError(Exception):
    """Refused, since what comes of it would not be private, or would be accounted wrongly; a bug or a typing error is not.

    It is raised together with the type that fits otherwise, so that ``except ValueError`` catches what it always did.

    Example:
        >>> try:
        ...     optimizer.step()
        ... except PrivacyError as reason:
        ...     print(f"refused for privacy: {reason}")
    """


class PrivacyValueError(PrivacyError, ValueError):
    """A value, or an order of calls, that would not be private."""


class PrivacyRuntimeError(PrivacyError, RuntimeError):
    """What a step did, or did not do, so that it would not be private."""


class PrivacyNotImplementedError(PrivacyError, NotImplementedError):
    """A model, layer or option whose result could not be made private."""


def located(error: Exception, place: str) -> Exception:
    """The same error, whose text begins with where it was raised.

    It is the object itself, so that its type, cause, traceback and attributes stay; but for types that do not show the text that
    they are given, for which it is one of the nearest built-in type, with the error as its cause.

    Args:
        error: a `ValueError` or a `RuntimeError`, of whatever type.
        place: what to call the place.

    Example:
        >>> except (ValueError, RuntimeError) as error:
        ...     raise located(error, "layer '0' (Linear)")
    """
    text = f"{place}: {error}"
    before, error.args = error.args, (text,)
    if str(error) == text:
        return error
    error.args = before
    near = next(kind for kind in (NotImplementedError, ValueError, RuntimeError, Exception) if isinstance(error, kind))
    other = near(f"{place}: {type(error).__name__}: {error}")
    other.__cause__ = error
    return other

"""The arguments of the Python API: declared options as explicit keywords, and what users may give in several forms."""

from __future__ import annotations

import inspect
import os
import reprlib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from p3d.pipeline.errors import InputError
from p3d.pipeline.types.options import options_in


def plain(value: Any) -> Any:
    """A number of numpy as Python's own; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def listed(value: str | Sequence[str] | None) -> list[str]:
    """A list of texts, which may be given as one text."""
    return [value] if isinstance(value, str) else list(value or ())


def path_of(value: Any, what: str) -> str:
    """The text of a path or URL that was given as the argument `what`. InputError for any other value."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        several = "; write several paths to a .txt or other list" if isinstance(value, list | tuple) else ""
        raise InputError(f"{what} must be a path or a URL, not {reprlib.repr(value)}{several}")
    return text


F = TypeVar("F", bound=Callable[..., Any])


def explicit(keywords: Any, *records: type) -> Callable[[F], F]:
    """Give a function that takes `**options` a signature with each key of the TypedDict `keywords`, for `help()`.

    Its default is the one that the records declare, else None. An option that the function does not have is a TypeError
    when it is called, as with any other keyword.
    """
    defaults = {field.name: field.default for record in records for field, _ in options_in(record)}

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        named = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, hint in keywords.__annotations__.items():
            kind, default = inspect.Parameter.KEYWORD_ONLY, defaults.get(name)
            named.append(inspect.Parameter(name, kind, default=default, annotation=hint.__forward_arg__))
        signature = own.replace(parameters=named)

        @wraps(function)
        def checked(*given: Any, **options: Any) -> Any:
            try:
                signature.bind(*given, **options)
            except TypeError as error:
                known = [like for name in options for like in get_close_matches(name, signature.parameters, 1)]
                hint = next((f"; did you mean {like}?" for like in known if like not in options), "")
                raise TypeError(f"p3d.{function.__name__}: {error}{hint}") from None
            return function(*given, **{name: plain(value) for name, value in options.items()})

        checked.__signature__ = signature  # type: ignore[attr-defined] # what `inspect` and `help` look at
        return checked  # type: ignore[return-value] # the same function

    return decorate

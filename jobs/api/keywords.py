"""Show the declared options of a function's `**options` as its explicit keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from p3d.pipeline.types.options import options_in

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
            signature.bind(*given, **options)
            return function(*given, **options)

        checked.__signature__ = signature  # type: ignore[attr-defined] # what `inspect` and `help` look at
        return checked  # type: ignore[return-value] # the same function

    return decorate

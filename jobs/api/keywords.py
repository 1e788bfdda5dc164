"""Show the declared options of a function's `**options` as its explicit keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, TypeVar

from p3d.pipeline.types.options import options_in

F = TypeVar("F", bound=Callable[..., Any])
PLAIN = ("bool", "int", "float", "str")


def explicit(*records: type, inherited: Collection[type] = ()) -> Callable[[F], F]:
    """Give a function that takes `**options` the signature with each option that the records declare, for `help()`.

    Options of the records `inherited` are None where they are not given. An option that the function does not have is a
    TypeError when it is called, as with any other keyword.
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        named = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for record in (*records, *inherited):
            for field, _ in options_in(record):
                default = None if record in inherited else field.default
                # what is a record of its own, such as MaxFailures, is given as the text of the command line
                hint = field.type if field.type in PLAIN or record not in inherited else "str"
                hint = hint if default is not None or "None" in str(hint) else f"{hint} | None"
                kind = inspect.Parameter.KEYWORD_ONLY
                named.append(inspect.Parameter(field.name, kind, default=default, annotation=hint))
        signature = own.replace(parameters=named)

        @wraps(function)
        def checked(*given: Any, **options: Any) -> Any:
            signature.bind(*given, **options)
            return function(*given, **options)

        checked.__signature__ = signature  # type: ignore[attr-defined] # what `inspect` and `help` look at
        return checked  # type: ignore[return-value] # the same function

    return decorate

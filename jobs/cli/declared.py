"""Options of the command line from the fields of records (`p3d.pipeline.types.options`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

import click

from p3d.pipeline.types.options import ABSENT, Option, flag_of, options_in

F = TypeVar("F", bound=Callable[..., Any])


class Declared(click.Option):
    """An option with the heading under which a help text shows it."""

    def __init__(self, *given: Any, group: str = "", **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.group = group


def options_of(
    record: type,
    *,
    only: Collection[str] = (),
    inherited: bool = False,
    group: str = "",
    types: Mapping[str, click.ParamType[Any]] = MappingProxyType({}),
) -> Callable[[F], F]:
    """Add an option for each one that a record declares, or for the fields `only`, in their order.

    With `inherited`, what is not typed is None: a resume takes it from the run before. Otherwise it is the default of
    the field. `types` has the click types of fields whose values are checked as they are typed. `group` is the heading
    of these options in a help text.
    """
    hints = get_type_hints(record)

    def decorate(verb: F) -> F:
        found = {field.name: (field, option) for field, option in options_in(record)}
        for name in reversed([*(only or found)]):
            field, option = found[name]
            settings = _settings(field, option, inherited)
            if field.type != "bool":
                settings["type"] = types.get(name) or _type(hints[name], option)
                settings["required"] = (
                    field.default is ABSENT and not inherited and type(None) not in get_args(hints[name])
                )
            flag = flag_of(field) + (f"/--{option.off}" if option.off else "")
            verb = click.option(flag, name, cls=Declared, group=group, **settings)(verb)
        return verb

    return decorate


def _settings(field: Field[Any], option: Option, inherited: bool) -> dict[str, Any]:
    """The arguments of `click.option` that say what an option does and what its default is."""
    settings: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if field.type == "bool":
        return settings | ({"default": field.default, "show_default": True} if option.off else {"is_flag": True})
    if isinstance(field.default, tuple):
        settings["multiple"] = True
    plain = isinstance(field.default, str | int | float)
    if plain and not inherited:
        return settings | {"default": field.default, "show_default": option.default_text or True}
    text = option.default_text or (_words(field.default) if plain else "")
    return settings | {"help": f"{option.help} Default: {text}." if text else option.help}


def _words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(hint: Any, option: Option) -> click.ParamType[Any]:
    """The click type of a field; text if it is of a type that is parsed later."""
    kind = next((one for one in get_args(hint) if one is not type(None)), hint) if get_args(hint) else hint
    if option.choices:
        return click.Choice(option.choices)
    if kind is int:
        return click.IntRange(_whole(option.low), _whole(option.high))
    if kind is float:
        return click.FloatRange(option.low, option.high, min_open=option.above)
    return click.STRING


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)

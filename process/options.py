"""The options of a settings class, one by one: for the reference manual, the environment and a first settings
file.

Law: an option has one name, from which key and variable follow; nothing here reads a file or a variable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from wire.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Option:
    """One leaf of a settings class.

    Attributes:
        key: dotted path in the file (`broker.port`).
        variable: the environment variable that overrides it (`SHOAL_BROKER_PORT`).
        type_name: as a reader of the manual would call it, with its bounds.
        default: as TOML; "required" when it must be given, empty when it is absent by default.
        description: the sentence of its `Meta`.
        type: msgspec's view of it.
    """

    key: str
    variable: str
    type_name: str
    default: str
    description: str
    type: inspect.Type


def option(sentence: str, **bounds: Any) -> msgspec.Meta:
    """How a settings class declares an option: a sentence for the manual and msgspec's bounds."""
    return msgspec.Meta(description=sentence, **bounds)


def options(cls: type[msgspec.Struct], prefix: str = "SHOAL_") -> list[Option]:
    """All leaves of a settings class, in the order of their declaration."""
    found = list(_leaves(cls, (), prefix))
    variables = [each.variable for each in found]
    twice = sorted({variable for variable in variables if variables.count(variable) > 1})
    if twice:
        raise ConfigurationError(f"two options of {cls.__name__} share the variable {twice[0]}")
    return found


def render_toml(settings: msgspec.Struct) -> str:
    """The settings as a commented TOML file that `load_settings` reads back to the same values."""
    lines: list[str] = []
    for section, body in _sections(settings, ()):
        if body and section:
            lines += ["", f"[{'.'.join(section)}]"]
        lines += body
    return "\n".join(lines).lstrip("\n") + "\n"


def fields_of(cls: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    """The fields of a settings class, with their types."""
    info = inspect.type_info(cls)
    if not isinstance(info, inspect.StructType):
        raise ConfigurationError(f"{cls.__name__} is not a settings class")
    return info.fields


def bare_type(kind: inspect.Type) -> inspect.Type:
    """A type without its `Meta`."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    return kind


def _leaves(cls: type[msgspec.Struct], at: tuple[str, ...], prefix: str) -> Iterator[Option]:
    for field in fields_of(cls):
        path = (*at, field.encode_name)
        section = _section_of(bare_type(field.type))
        if section is not None:
            yield from _leaves(section, path, prefix)
            continue
        yield Option(
            key=".".join(path),
            variable=prefix + "_".join(path).upper().replace("-", "_"),
            type_name=_type_name(field.type),
            default=_default(field),
            description=_description(field.type),
            type=field.type,
        )


def _section_of(kind: inspect.Type) -> type[msgspec.Struct] | None:
    """The class of a section, also of one that may be left out (`Section | None`); None for an option."""
    choices = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    structs = [choice.cls for choice in choices if isinstance(choice, inspect.StructType)]
    others = [c for c in choices if not isinstance(c, inspect.StructType | inspect.NoneType)]
    return structs[0] if len(structs) == 1 and not others else None


def _sections(settings: msgspec.Struct, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """A section's own lines come before those of the sections in it, as TOML wants it."""
    body: list[str] = []
    inner: list[tuple[tuple[str, ...], msgspec.Struct]] = []
    for field in fields_of(type(settings)):
        value = getattr(settings, field.name)
        if isinstance(value, msgspec.Struct):
            inner.append(((*at, field.encode_name), value))
            continue
        description = _description(field.type)
        if description:
            body.append(f"# {description}")
        if value is None:
            body.append(f"# {field.encode_name} =")
        else:
            body.append(f"{field.encode_name} = {_toml(value)}")
    yield at, body
    for path, struct in inner:
        yield from _sections(struct, path)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return f"[{', '.join(_toml(item) for item in items)}]"
    if isinstance(value, dict):
        pairs = (
            f"{json.dumps(str(name), ensure_ascii=False)} = {_toml(item)}" for name, item in value.items()
        )
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, msgspec.Struct):
        return _toml({name: item for name, item in msgspec.structs.asdict(value).items() if item is not None})
    raise ConfigurationError(f"a setting of type {type(value).__name__} has no form in TOML")


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return "" if value is None else _toml(value)


def _description(kind: inspect.Type) -> str:
    while isinstance(kind, inspect.Metadata):
        text = (kind.extra_json_schema or {}).get("description")
        if text:
            return str(text)
        kind = kind.type
    return ""


def _type_name(kind: inspect.Type) -> str:
    kind = bare_type(kind)
    match kind:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            return _bounded("whole number" if isinstance(kind, inspect.IntType) else "number", kind)
        case inspect.StrType(pattern=pattern):
            return f"text like {pattern}" if pattern else "text"
        case inspect.CustomType(cls=cls) if cls is Path:
            return "path"
        case inspect.LiteralType(values=values):
            return " or ".join(json.dumps(value) for value in values)
        case inspect.EnumType(cls=cls):
            return " or ".join(json.dumps(member.value) for member in cls)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return f"list of {_type_name(item)}"
        case inspect.DictType(value_type=value):
            return f"table of {_type_name(value)}"
        case inspect.UnionType(types=types):
            return " or ".join(_type_name(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.StructType(cls=cls):
            return cls.__name__
    return type(kind).__name__.removesuffix("Type").lower()


def _bounded(name: str, kind: inspect.IntType | inspect.FloatType) -> str:
    limits = (("≥", kind.ge), (">", kind.gt), ("≤", kind.le), ("<", kind.lt))
    stated = [f"{sign} {limit:g}" for sign, limit in limits if limit is not None]
    return f"{name} ({', '.join(stated)})" if stated else name

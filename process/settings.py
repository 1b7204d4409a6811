"""Settings: one TOML file and environment variables over it, read once into a frozen, validated struct.

A settings class is a frozen `msgspec.Struct` whose fields are scalars, `Path`, lists, dicts or further
structs; bounds and one sentence per option stand in `Annotated[..., msgspec.Meta(ge=…, description=…)]`.
Laws: an unknown key is an error that names the nearest one; a value is never changed in silence; a secret is
given by the path of a file; each program has a prefix of its own for its variables, so that two of them share a
machine, and a variable that concerns nobody is an error of each.

    settings = load_settings(EdgeSettings, Path("edge.toml"), os.environ, "SHOAL_EDGE_")
    # [broker] port = 8883      in the file, or SHOAL_EDGE_BROKER_PORT=8883 in the environment
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import inspect

from process.options import Option, bare_type, fields_of, option, options
from wire.errors import ConfigurationError

Settings = TypeVar("Settings", bound=msgspec.Struct)

FAMILY = "SHOAL_"
PROGRAM_PREFIXES = ("SHOAL_EDGE_", "SHOAL_CLOUD_")
SHARED_VARIABLES = ("SHOAL_STATE", "SHOAL_ENROLL_TOKEN", "SHOAL_ENROLL_TOKEN_FILE")
"""Variables of the family that are no settings: where the state is, and a container's enrolment token."""
# What Kubernetes tells every pod about a service that is called shoal-…; nobody set it as a setting.
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_(HOST|PORT(_\w+)?)=.*|\w+_PORT(_\d+_(TCP|UDP)(_\w+)?=.*|=(tcp|udp)://.*)"
)

MAX_FILE_BYTES = 1_048_576
MAX_SECRET_BYTES = 65_536


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[log]`, of every program."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], option("The least severe line that is written.")
    ] = "info"
    json: Annotated[bool, option("Write one JSON object a line instead of text.")] = False


def load_settings(
    cls: type[Settings],
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prefix: str = FAMILY,
) -> Settings:
    """Reads settings.

    Args:
        cls: a frozen struct.
        path: the TOML file, or None for defaults and environment only. Relative paths in it start at its
            folder.
        environment: usually `os.environ`; None reads no variable.
        prefix: of the variables of this program. Any other of the family is an error, unless it is one of
            `SHARED_VARIABLES` or another program's.

    Raises:
        ConfigurationError: (operator) no such file, no TOML, an unknown key or variable, a value of the wrong
            type or out of bounds, an option that is missing. The message names file or variable, and the key.
    """
    if not cls.__struct_config__.frozen:
        raise ConfigurationError(f"settings class {cls.__name__} is not frozen")
    document = _read_toml(path) if path is not None else {}
    _refuse_unknown(cls, document, (), str(path))
    sources: dict[str, str] = {}
    if environment is not None:
        sources = _overlay(cls, document, environment, prefix)
    _refuse_not_finite(document, (), sources, path)
    base = path.parent if path is not None else Path()

    def to_path(kind: type[Any], value: Any) -> Any:
        if kind is Path and isinstance(value, str) and value:
            return base / Path(value).expanduser()
        raise TypeError(f"Expected a path, got {value!r}")

    try:
        return msgspec.convert(document, cls, strict=True, dec_hook=to_path)
    except msgspec.ValidationError as error:
        raise _explain(error, sources, path, cls, prefix) from error


def check_settings(settings: Settings, where: str) -> Settings:
    """Settings that were put together in code (from a command line), held to the bounds of their class.

    Args:
        where: they come from, for the message.

    Raises:
        ConfigurationError: (operator) as `load_settings`.
    """
    cls = type(settings)
    plain = msgspec.to_builtins(settings)
    _refuse_not_finite(plain, (), {}, Path(where))
    try:
        return msgspec.convert(plain, cls)
    except msgspec.ValidationError as error:
        raise _explain(error, {}, Path(where), cls, FAMILY) from error


def read_secret(path: Path, what: str) -> str:
    """Reads a token, password or key that the settings name by its file; the last line end is cut off.

    Args:
        what: what the file holds, for the message ("the enrolment token").

    Raises:
        ConfigurationError: (operator) it cannot be read, is empty, too large, or no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_BYTES + 1)
        text = data.decode("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read {what} from {path}: {_cause(error)}", hint="name a text file that you may read"
        ) from error
    if not text or len(data) > MAX_SECRET_BYTES:
        raise ConfigurationError(
            f"{path} holds no usable secret for {what}", hint="write it there, and nothing else"
        )
    return text


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path} is above {MAX_FILE_BYTES} bytes", hint="is it a settings file?")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read settings from {path}: {_cause(error)}", hint="name a TOML file that you may read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {_cause(error)}", hint="save it as UTF-8") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path} is nested too deeply", hint="is it a settings file?") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            f"{path} is not TOML: {error}", hint="text stands in quotes, a table in [brackets]; see toml.io"
        ) from error


def _cause(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


# Unknown keys.


def _refuse_unknown(cls: type[msgspec.Struct], given: Any, at: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict):
        return  # msgspec will say what it expected
    fields = {field.encode_name: field.type for field in fields_of(cls)}
    for key, value in given.items():
        if key not in fields:
            dotted = ".".join((*at, key))
            raise ConfigurationError(
                f"{where}: unknown key {dotted!r}",
                hint=_nearest(key, fields, "known keys here"),
                key=dotted,
            )
        for inner in _structs_in(fields[key]):
            for part in _parts(value):
                _refuse_unknown(inner, part, (*at, key), where)


def _nearest(name: str, known: Collection[str], what: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"{what}: {', '.join(sorted(known)) or 'none'}"


def _structs_in(kind: inspect.Type) -> list[type[msgspec.Struct]]:
    """Structs that a value of this type may hold directly, in a list or in a dict."""
    kind = bare_type(kind)
    if isinstance(kind, inspect.StructType):
        return [kind.cls]
    if isinstance(kind, inspect.UnionType):
        return [found for inner in kind.types for found in _structs_in(inner)]
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        return _structs_in(kind.item_type)
    if isinstance(kind, inspect.DictType):
        return _structs_in(kind.value_type)
    return []


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# Environment.


def _overlay(
    cls: type[msgspec.Struct], document: dict[str, Any], environment: Mapping[str, str], prefix: str
) -> dict[str, str]:
    """Puts variables into the document; returns which key came from which variable."""
    known = {option.variable: option for option in options(cls, prefix)}
    sources: dict[str, str] = {}
    for name in sorted(environment):
        if name not in known:
            if _concerns(name, environment[name], prefix):
                raise ConfigurationError(
                    f"environment variable {name} names no option",
                    hint=_nearest_variable(name, known, prefix),
                    key=name,
                )
            continue
        option = known[name]
        *sections, last = option.key.split(".")
        target = document
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigurationError(
                    f"{option.key}: {section!r} is not a table",
                    hint=f"write [{section}] in the file, or leave it to the variable {name}",
                    key=option.key,
                )
        target[last] = _from_text(environment[name], option)
        sources[option.key] = name
    return sources


def _concerns(name: str, value: str, prefix: str) -> bool:
    """Whether a variable that is no option was meant for this program, or for none at all."""
    if name in SHARED_VARIABLES or _SERVICE_LINK.fullmatch(f"{name}={value}"):
        return False
    others = tuple(other for other in PROGRAM_PREFIXES if other != prefix)
    return name.startswith(prefix) or (name.startswith(FAMILY) and not name.startswith(others))


def _nearest_variable(name: str, known: Collection[str], prefix: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"the variables of this program begin with {prefix}; docs/reference.md lists them"


def _from_text(text: str, option: Option) -> Any:
    """A variable's text as the value that TOML would have given."""
    kinds = _alternatives(option.type)
    if any(isinstance(kind, inspect.CustomType) for kind in kinds):
        return str(Path.cwd() / Path(text).expanduser())  # the file's own paths start at its folder
    if any(isinstance(kind, inspect.StrType | inspect.EnumType) for kind in kinds):
        return text
    if any(isinstance(kind, inspect.LiteralType) for kind in kinds) and not text.lstrip("-").isdigit():
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # msgspec will say what it expected


def _refuse_not_finite(
    value: Any, at: tuple[str, ...], sources: Mapping[str, str], path: Path | None
) -> None:
    """TOML has `nan` and `inf`; a bound never stops the first, and no option means either."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_not_finite(inner, (*at, key), sources, path)
    elif isinstance(value, list):
        for inner in value:
            _refuse_not_finite(inner, at, sources, path)
    elif isinstance(value, float) and not math.isfinite(value):
        key = ".".join(at)
        where = f"variable {sources[key]}" if key in sources else str(path)
        raise ConfigurationError(f"{where}: {key}: {value} is not a number", hint="a finite number", key=key)


def _alternatives(kind: inspect.Type) -> list[inspect.Type]:
    kind = bare_type(kind)
    if isinstance(kind, inspect.UnionType):
        return [inner for one in kind.types for inner in _alternatives(one)]
    return [kind]


def _in_words(text: str) -> str:
    """msgspec's words for types as TOML has them."""
    for word, ours in (("object", "table"), ("array", "list")):
        text = re.sub(rf"\b{word}\b", f"a {ours}", text)
    return text


def _explain(
    error: msgspec.ValidationError,
    sources: Mapping[str, str],
    path: Path | None,
    cls: type[msgspec.Struct],
    prefix: str,
) -> ConfigurationError:
    """msgspec says `Expected … - at `$.broker.port``; an operator wants file or variable, key and what it
    means.
    """
    text, _, location = str(error).partition(" - at `")
    key = location.removesuffix("`").removeprefix("$").removeprefix(".")
    missing = "missing required field" in text
    if missing and "`" in text:
        key = ".".join(part for part in (key, text.split("`")[1]) if part)
    where = f"variable {sources[key]}" if key in sources else (str(path) if path is not None else "settings")
    described = {option.key: option for option in options(cls, prefix)}.get(key)
    hint = f"{described.description} Wanted: {described.type_name}." if described is not None else ""
    hint = hint or "docs/reference.md lists every key with its type"
    if missing and described is not None:
        hint = f"set it in the file, or {described.variable} in the environment. {hint}".strip()
    problem = "is missing" if missing else _in_words(text[:1].lower() + text[1:].replace("`", ""))
    return ConfigurationError(f"{where}: {key or 'the file'}: {problem}", hint=hint, key=key)

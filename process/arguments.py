"""The parser behind every command line: what argparse would say in its own form, as one error of ours.

Laws of the file: a wrong command line is a `ConfigurationError` with a hint, never argparse's usage and exit; what an
option takes is checked before its command runs; no default is guessed for text that was left empty.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from process.version import VERSION
from wire.errors import ConfigurationError

MAX_NUMBER = 2**63 - 1
"""What a database column holds."""
_MAX_QUOTED_CHARACTERS = 60


class CommandParser(argparse.ArgumentParser):
    """A command or one of its subcommands; those that `add_subparsers` makes are of this class too."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print.

        Raises:
            ConfigurationError: (operator) always.
        """
        raise ConfigurationError(message, hint=f"`{self.prog} --help` shows what it takes")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options of a command line, which has `--version`; whoever calls a command calls this.

        Raises:
            ConfigurationError: (operator) an argument is missing, unknown, out of bounds or not UTF-8.
        """
        self.add_argument("--version", action="version", version=f"{self.prog} {VERSION}")
        for argument in arguments:
            if not _is_text(argument):
                raise ConfigurationError(
                    f"the argument {_quoted(argument)} is not UTF-8 text", hint="write it in UTF-8"
                )
        return self.parse_args(arguments)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but nothing unknown is left: here the right subcommand can name the nearest option."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            help_hint = f"`{self.prog} --help` shows what it takes"
            raise ConfigurationError(
                f"{self.prog} does not take {_quoted(unknown[0])}",
                hint=f"did you mean {close[0]}?" if close and unknown[0].startswith("-") else help_hint,
            )
        return found, unknown


def whole_number(low: int, high: int = MAX_NUMBER) -> Callable[[str], int]:
    """For `type=` of an option: a whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is not a whole number") from error
        if not low <= value <= high:
            bounds = f"from {low} up" if high == MAX_NUMBER else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is not {bounds}")
        return value

    return read


def path(text: str) -> Path:
    """For `type=` of an option: a path. Empty text, as an unset variable of a shell leaves it, is not `.`.

    Raises:
        argparse.ArgumentTypeError: (operator) it is empty, or not UTF-8.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: is a variable unset?")
    if not _is_text(text):
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is not UTF-8 text")
    return Path(text)


def _is_text(text: str) -> bool:
    """Whether it can be stored and printed: bytes that are not UTF-8 come in as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _quoted(text: str) -> str:
    return ascii(text) if len(text) <= _MAX_QUOTED_CHARACTERS else ascii(text[:_MAX_QUOTED_CHARACTERS]) + "…"

"""Wrong command lines, before any command runs."""

from __future__ import annotations

import pytest

from process.arguments import CommandParser, path, whole_number
from wire.errors import ConfigurationError


def parser() -> CommandParser:
    made = CommandParser(prog="shoal")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run")
    run.add_argument("--count", type=whole_number(1, 9))
    run.add_argument("--state", type=path)
    return made


def test_right_command_line_is_read() -> None:
    options = parser().read(["run", "--count", "3", "--state", "x"])
    assert (options.command, options.count, str(options.state)) == ("run", 3, "x")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "required: COMMAND", "`shoal --help`"),
        (["fly"], "invalid choice: 'fly'", "`shoal --help`"),
        (["run", "--cuont", "3"], "shoal run does not take '--cuont'", "did you mean --count?"),
        (["run", "--cuont=3"], "shoal run does not take '--cuont=3'", "did you mean --count?"),
        (["run", "there"], "shoal run does not take 'there'", "`shoal run --help`"),
        (["run", "--count"], "--count: expected one argument", "`shoal run --help`"),
        (["run", "--count", "many"], "'many' is not a whole number", "`shoal run --help`"),
        (["run", "--count", "1.5"], "'1.5' is not a whole number", "`shoal run --help`"),
        (["run", "--count", "nan"], "'nan' is not a whole number", "`shoal run --help`"),
        (["run", "--count", "-3"], "'-3' is not from 1 to 9", "`shoal run --help`"),
        (["run", "--count", "9" * 30], "is not from 1 to 9", "`shoal run --help`"),
        (["run", "--count", "9" * 9000], "is not a whole number", "`shoal run --help`"),
        (["run", "--state", ""], "the path is empty", "`shoal run --help`"),
        (["run", "--state", "\udcff"], "'\\udcff' is not UTF-8 text", "UTF-8"),
    ],
)
def test_wrong_command_line_is_one_error_with_a_hint(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parser().read(arguments)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 200
    assert hint in raised.value.hint
    assert capsys.readouterr() == ("", "")

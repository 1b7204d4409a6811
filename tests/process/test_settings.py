"""Settings: the file, the environment over it, and errors that an operator can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from process.options import options, render_toml
from process.settings import load_settings, read_secret
from wire.errors import ConfigurationError


class Broker(msgspec.Struct, frozen=True):
    host: Annotated[str, Meta(min_length=1, description="Name or address of the broker.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535, description="Its TLS port.")] = 8883
    kind: Annotated[Literal["auto", "mosquitto"], Meta(description="Which broker is started.")] = "auto"
    ca_file: Annotated[Path | None, Meta(description="PEM of the authority.")] = None


class Shard(msgspec.Struct, frozen=True):
    name: str
    devices: Annotated[int, Meta(ge=1)] = 1


class Demo(msgspec.Struct, frozen=True):
    fleet: Annotated[str, Meta(pattern="^[a-z]+$", description="Name of the fleet.")]
    broker: Broker = Broker()
    learning_rate: Annotated[float, Meta(gt=0, le=1, description="Of the first round.")] = 0.05
    verbose: bool = False
    rings: list[str] = msgspec.field(default_factory=list)
    weights: dict[str, float] = msgspec.field(default_factory=dict)
    shards: list[Shard] = msgspec.field(default_factory=list)
    timeout_seconds: float | None = None


class Clash(msgspec.Struct, frozen=True):
    broker: Broker = Broker()
    broker_port: int = 2


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_file_and_environment_are_laid_over_one_another(tmp_path: Path) -> None:
    path = write(tmp_path, 'fleet = "north"\nlearning_rate = 0.1\n[broker]\nhost = "b"\nca_file = "ca.pem"\n')
    environment = {
        "SHOAL_BROKER_PORT": "1883",
        "SHOAL_VERBOSE": "true",
        "SHOAL_RINGS": '["a", "b"]',
        "SHOAL_LEARNING_RATE": "1",
        "PATH": "/bin",
    }
    settings = load_settings(Demo, path, environment)
    assert settings == Demo(
        fleet="north",
        broker=Broker(host="b", port=1883, ca_file=tmp_path / "ca.pem"),
        learning_rate=1.0,
        verbose=True,
        rings=["a", "b"],
    )


def test_environment_alone_is_enough_and_text_stays_text() -> None:
    settings = load_settings(Demo, None, {"SHOAL_FLEET": "true", "SHOAL_BROKER_HOST": "10"})
    assert (settings.fleet, settings.broker.host) == ("true", "10")


def test_paths_start_at_the_file_or_for_a_variable_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 'fleet = "north"\n[broker]\nca_file = "sub/ca.pem"\n')
    monkeypatch.chdir("/")
    assert load_settings(Demo, path).broker.ca_file == tmp_path / "sub" / "ca.pem"
    overlaid = load_settings(Demo, path, {"SHOAL_BROKER_CA_FILE": "ca.pem"})
    assert overlaid.broker.ca_file == Path("/ca.pem")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("fleet = 'a'\nlearning_rat = 1", "unknown key 'learning_rat'", "did you mean 'learning_rate'?"),
        ("fleet = 'a'\n[broker]\nprot = 1", "unknown key 'broker.prot'", "did you mean 'port'?"),
        ("fleet = 'a'\n[[shards]]\nname='x'\ndevice=1", "unknown key 'shards.device'", "'devices'"),
        ("fleet = 'a'\nzzz = 1", "unknown key 'zzz'", "known keys here: broker, fleet"),
        ("fleet = 'a'\n[broker]\nport = 0", "broker.port: expected int >= 1", "Its TLS port."),
        ("fleet = 'a'\n[broker]\nport = 'x'", "broker.port: expected int, got str", "Its TLS port."),
        ("fleet = 'a'\nbroker = 3", "broker: expected a table, got int", ""),
        ("fleet = 'A'", "fleet: expected str matching regex", "Name of the fleet."),
        ("fleet = 'a'\n[broker]\nkind = 'rabbit'", "broker.kind: invalid enum value 'rabbit'", "Which"),
        ("fleet = 'a'\n[broker]\nca_file = 3", "broker.ca_file: expected a path", "PEM"),
        ("learning_rate = 0.1", "fleet: is missing", "SHOAL_FLEET"),
        ("fleet = 'a'\n[[shards]]\ndevices = 2", "shards[0].name: is missing", ""),
        ("fleet = \n", "is not TOML: Invalid value (at line 1", ""),
        ("fleet = 'a'\nverbose = 1", "verbose: expected bool, got int", ""),
    ],
)
def test_wrong_file_is_one_error_with_file_key_and_hint(
    text: str, message: str, hint: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as raised:
        load_settings(Demo, path, {})
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("environment", "message", "hint"),
    [
        ({"SHOAL_BROKER_PROT": "1"}, "SHOAL_BROKER_PROT names no option", "SHOAL_BROKER_PORT"),
        (
            {"SHOAL_BROKER_PORT": "99999"},
            "variable SHOAL_BROKER_PORT: broker.port: expected int <= 65535",
            "TLS",
        ),
        (
            {"SHOAL_BROKER_PORT": "many"},
            "variable SHOAL_BROKER_PORT: broker.port: expected int, got str",
            "TLS",
        ),
        ({"SHOAL_VERBOSE": "maybe"}, "variable SHOAL_VERBOSE: verbose: expected bool, got str", ""),
    ],
)
def test_wrong_variable_is_one_error_that_names_it(
    environment: dict[str, str], message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_settings(Demo, write(tmp_path, "fleet = 'a'"), environment)
    assert message in str(raised.value)
    assert hint in raised.value.hint


def test_variable_of_another_meaning_and_prefix_are_left_alone(tmp_path: Path) -> None:
    environment = {"SHOAL_ENROLL_TOKEN": "x", "OTHER_FLEET": "b"}
    path = write(tmp_path, "fleet = 'a'")
    assert load_settings(Demo, path, environment).fleet == "a"
    assert load_settings(Demo, path, environment, prefix="OTHER_").fleet == "b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHOAL_CLOUD_BROKER_PROT", "1"),
        ("SHOAL_STATE", "/x"),
        ("SHOAL_EDGE_SERVICE_HOST", "10.0.0.1"),
        ("SHOAL_EDGE_SERVICE_PORT_HTTPS", "8443"),
        ("SHOAL_EDGE_PORT", "tcp://10.0.0.1:8443"),
        ("SHOAL_EDGE_PORT_8443_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_variable_of_another_program_or_of_kubernetes_is_no_error(
    name: str, value: str, tmp_path: Path
) -> None:
    assert load_settings(Demo, write(tmp_path, "fleet = 'a'"), {name: value}, "SHOAL_EDGE_").fleet == "a"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SHOAL_EDGE_FLEAT", "did you mean 'SHOAL_EDGE_FLEET'?"),
        ("SHOAL_EDG_FLEET", "did you mean 'SHOAL_EDGE_FLEET'?"),
        ("SHOAL_SOMETHING_ELSE", "begin with SHOAL_EDGE_"),
        ("SHOAL_EDGE_PORT", "did you mean 'SHOAL_EDGE_BROKER_PORT'?"),
    ],
)
def test_variable_of_no_program_is_an_error(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} names no option") as raised:
        load_settings(Demo, write(tmp_path, "fleet = 'a'"), {name: "b"}, "SHOAL_EDGE_")
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("fleet = 'a'\nlearning_rate = nan", {}, "settings.toml: learning_rate: nan is not a number"),
        ("fleet = 'a'\n[weights]\nx = inf", {}, "settings.toml: weights.x: inf is not a number"),
        (
            "fleet = 'a'",
            {"SHOAL_LEARNING_RATE": "nan"},
            "variable SHOAL_LEARNING_RATE: learning_rate: nan is not a number",
        ),
        ("fleet = 'a'\nx = " + "[" * 5000, {}, "settings.toml is"),
    ],
)
def test_number_that_is_none_is_an_error(
    text: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load_settings(Demo, write(tmp_path, text), environment)
    assert message in str(raised.value)
    assert raised.value.hint


def test_file_that_is_absent_binary_or_huge_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_settings(Demo, tmp_path / "absent.toml")
    with pytest.raises(ConfigurationError, match="Is a directory"):
        load_settings(Demo, tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="is not TOML"):
        load_settings(Demo, tmp_path / "binary.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * 1_100_000)
    with pytest.raises(ConfigurationError, match="above 1048576 bytes"):
        load_settings(Demo, tmp_path / "huge.toml")


def test_settings_class_that_can_change_is_refused() -> None:
    class Loose(msgspec.Struct):
        name: str = "x"

    with pytest.raises(ConfigurationError, match="not frozen"):
        load_settings(Loose)


def test_options_list_every_leaf_with_variable_bounds_and_default() -> None:
    listed = {option.key: option for option in options(Demo)}
    assert list(listed)[:5] == ["fleet", "broker.host", "broker.port", "broker.kind", "broker.ca_file"]
    port = listed["broker.port"]
    assert (port.variable, port.type_name) == ("SHOAL_BROKER_PORT", "whole number (≥ 1, ≤ 65535)")
    assert (port.default, port.description) == ("8883", "Its TLS port.")
    assert listed["fleet"].default == "required"
    assert listed["broker.kind"].type_name == '"auto" or "mosquitto"'
    assert listed["broker.ca_file"].type_name == "path"
    assert listed["timeout_seconds"].type_name == "number"


def test_two_options_of_one_variable_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="share the variable SHOAL_BROKER_PORT"):
        options(Clash)


def test_rendered_settings_read_back_as_they_were(tmp_path: Path) -> None:
    settings = Demo(
        fleet="north",
        broker=Broker(host='quo"te\\ü\n', ca_file=Path("/x/ca.pem")),
        learning_rate=1e-05,
        verbose=True,
        rings=["a", "b"],
        weights={"a b": 0.5, "c": 2.0},
        shards=[Shard("one", 3), Shard("two")],
    )
    text = render_toml(settings)
    assert "# Its TLS port.\nport = 8883" in text
    assert load_settings(Demo, write(tmp_path, text)) == settings


def test_secret_is_read_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  s3cret \n", encoding="utf-8")
    assert read_secret(path, "the token") == "  s3cret "
    for content in (b"", b"\n", b"\xff\xfe", b"x" * 70_000):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="the token"):
            read_secret(path, "the token")
    with pytest.raises(ConfigurationError, match="No such file"):
        read_secret(tmp_path / "absent", "the token")

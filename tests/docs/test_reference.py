"""docs/reference.md agrees with the code: generated parts, and the tables that people wrote."""

from __future__ import annotations

import re

import pytest

from process.exits import EXIT_CODES
from tests.docs.reference_tables import PARTS, PLACES, REFERENCE, written
from wire.errors import MessageError
from wire.messages import InferenceReport, Telemetry
from wire.topics import Topics

TEXT = REFERENCE.read_text(encoding="utf-8")
EXAMPLES = {
    "{device}": "gateway-1",
    "{shard}": "0",
    "{round}": "12",
    "{chunk}": "3",
    "{sha}": "ab" * 32,
    "{channel}": "stable",
}


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"there is no section {title}"
    return found[1]


def documented_topics() -> list[str]:
    rows = re.findall(r"^\| (`[^|]*`) \| (?:up|down) \|", section("Topics"), re.MULTILINE)
    return [topic for row in rows for topic in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("name", PARTS)
def test_generated_part_is_in_step_with_the_code(name: str) -> None:
    """`python -m tests.docs.reference_tables` writes them anew."""
    text = PLACES[name].read_text(encoding="utf-8")
    begin = text.index(f"<!-- generated: {name} -->\n")
    part = text[begin : text.index("<!-- end -->", begin)] + "<!-- end -->"
    # How an older or newer Python breaks lines of a help text is not ours to say.
    assert written(part).split() == part.split()


def test_every_exit_code_is_listed() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)}
    assert listed == set(EXIT_CODES)


@pytest.mark.parametrize("topic", documented_topics())
def test_documented_topic_is_in_the_table_of_the_code(topic: str) -> None:
    topics = Topics("acme", "watches")
    for placeholder, value in EXAMPLES.items():
        topic = topic.replace(placeholder, value)
    assert topics.parse(f"{topics.base}/{topic}").kind == topic.partition("/")[0]


def test_every_kind_of_topic_is_documented() -> None:
    topics = Topics("acme", "watches")
    documented = {topic.partition("/")[0] for topic in documented_topics()}
    shapes = ("g", "0/g/1/2", "now", "1", f"{'ab' * 32}/0", f"g/{'ab' * 32}")
    for kind in (a + b for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"):
        for shape in shapes:
            try:
                topics.parse(f"{topics.base}/{kind}/{shape}")
            except MessageError:
                continue
            assert kind in documented


@pytest.mark.parametrize("body", [Telemetry, InferenceReport])
def test_every_field_of_a_report_is_documented(body: type[Telemetry | InferenceReport]) -> None:
    after = section("Metrics").split(f"`{body.__name__}`", 1)[1].lstrip()
    table = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert table
    names = {
        name
        for row in re.findall(r"^\| (`[^|]*) \|", table[0], re.MULTILINE)
        for name in row.split("`")[1::2]
    }
    assert names == set(body.__struct_fields__)

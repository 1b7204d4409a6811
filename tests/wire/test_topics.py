"""The topic table: what is built parses back, and nothing else parses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import MessageError
from wire.messages import BODIES
from wire.topics import Topic, Topics, message_types

TOPICS = Topics("acme", "wrists")
SHA = "0a" * 32
TABLE = {
    TOPICS.by_device("st", "w-1"): Topic("st", device="w-1"),
    TOPICS.by_device("ea", "w_1"): Topic("ea", device="w_1"),
    TOPICS.invitation(None): Topic("rd", round_number=-1),
    TOPICS.invitation(12): Topic("rd", round_number=12),
    TOPICS.upload("0", "w-1", 3, 40): Topic("up", device="w-1", shard="0", round_number=3, chunk=40),
    TOPICS.announcement("stable"): Topic("md", channel="stable"),
    TOPICS.blob_chunk(SHA, 7): Topic("bl", sha256=SHA, chunk=7),
    TOPICS.need("w-1", SHA): Topic("nd", device="w-1", sha256=SHA),
}


@pytest.mark.parametrize("text", TABLE)
def test_topic_parses_back(text: str) -> None:
    assert TOPICS.parse(text) == TABLE[text]


@pytest.mark.parametrize(
    "levels",
    ["", "st", "st/", "st/a/b", "st/+", "st/#", "st/a\n", "st/" + "a" * 65, "xx/a", "rd/01", "rd/-1", "rd/1e3",
     "rd/" + "9" * 16, "rd/Now", "up/0/w/3", "up/0/w/3/4/5", "up/0/w/x/4", "up/0/w/3/٣", "bl/" + SHA.upper() + "/0",
     "bl/" + SHA[:-1] + "/0", f"nd/w/{SHA}/0", f"md/{'c' * 65}", "st/é", "st/a" + "/" * 600],
)  # fmt: skip
def test_topic_outside_of_the_table_is_refused(levels: str) -> None:
    with pytest.raises(MessageError):
        TOPICS.parse(f"{TOPICS.base}/{levels}")


@pytest.mark.parametrize(
    "base", ["fl/2/acme/wrists", "fl/1/acme/ankles", "fl/1/rival/wrists", "fl/1/acme", "$SYS"]
)
def test_topic_of_another_fleet_or_version_is_refused(base: str) -> None:
    with pytest.raises(MessageError):
        TOPICS.parse(f"{base}/st/w-1")


@given(st.text(max_size=60))
def test_any_text_gives_a_topic_or_our_error(text: str) -> None:
    for whole in (text, f"{TOPICS.base}/{text}", f"{TOPICS.base}/st/{text}"):
        try:
            parsed = TOPICS.parse(whole)
        except MessageError:
            continue
        assert parsed.kind in whole


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "a\n", "x" * 65, "é"])
def test_name_that_cannot_stand_in_a_topic_is_refused(name: str) -> None:
    for build in (
        lambda: Topics(name, "wrists"),
        lambda: Topics("acme", name),
        lambda: TOPICS.by_device("st", name),
        lambda: TOPICS.announcement(name),
        lambda: TOPICS.upload("0", name, 0, 0),
        lambda: TOPICS.upload(name, "w-1", 0, 0),
        lambda: TOPICS.need(name, SHA),
        lambda: TOPICS.blob_chunk(name, 0),
    ):
        with pytest.raises(MessageError):
            build()


def test_numbers_below_zero_and_kinds_without_a_device_are_refused() -> None:
    for build in (
        lambda: TOPICS.invitation(-1),
        lambda: TOPICS.upload("0", "w-1", -1, 0),
        lambda: TOPICS.upload("0", "w-1", 0, -1),
        lambda: TOPICS.blob_chunk(SHA, -1),
        lambda: TOPICS.by_device("rd", "w-1"),
        lambda: TOPICS.by_device("zz", "w-1"),
    ):
        with pytest.raises(MessageError):
            build()


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT's rule for `+`."""
    levels, given = topic_filter.split("/"), topic.split("/")
    return len(levels) == len(given) and all(a in ("+", b) for a, b in zip(levels, given, strict=True))


def test_filters_cover_what_each_side_must_hear_and_no_more() -> None:
    device = TOPICS.device_filters("w-1", "stable")
    cloud = TOPICS.cloud_filters()
    heard_by_device = {text for text in TABLE if any(matches(one, text) for one in device)}
    heard_by_cloud = {text for text in TABLE if any(matches(one, text) for one in cloud)}
    down = {text for text, topic in TABLE.items() if topic.kind in ("rd", "md", "bl", "ak", "cm", "ea")}
    assert heard_by_cloud == set(TABLE) - down
    # A device hears `rd/now` (a round's own topic is for late joiners) and nothing of another device.
    assert heard_by_device == down - {TOPICS.invitation(12), TOPICS.by_device("ea", "w_1")}


def test_every_body_has_a_topic() -> None:
    kinds = {topic.kind for topic in TABLE.values()} | {"tm", "ir", "jn", "cm", "ak"}
    assert set(BODIES) <= frozenset().union(*(message_types(kind) for kind in kinds))

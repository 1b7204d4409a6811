"""What a device can and cannot read and write at the broker that `shoal-cloud broker config` configures.

By delivery: mosquitto grants subscriptions under which nothing will ever come, so a SUBACK proves nothing. Each case is
tried at a second broker too, which has the same configuration without the access file: what must not arrive at the
first must arrive there, or the case is dead.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.transport.conftest import needs_mosquitto
from tests.transport.operated import FLEET, OBSERVER, TENANT, Cloud, Stage, operated
from tests.transport.raw_client import (
    CONNECT,
    DEADLINE_SECONDS,
    MAXIMUM_PACKET,
    MAXIMUM_QOS,
    NOT_AUTHORISED,
    PUBLISH,
    SERVER_KEEPALIVE,
    Gone,
    remaining_length,
    text,
)
from wire.transport.broker_configuration import BrokerLimits

pytestmark = needs_mosquitto

PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
SHA = "5e" * 32
BASE = f"fl/1/{TENANT}/{FLEET}"
OWN, OTHER = "dev1", "dev2"
AGGREGATOR = "aggregator"


# ---- the table of the protocol, and what follows from it ---------------------------------------------------


def topic_table() -> list[tuple[str, str]]:
    """Topic and direction (`up`, `down`, `all`) of every row of docs/protocol.md, clause 2.1."""
    clause = PROTOCOL.read_text(encoding="utf-8").partition("\n## 2 Topics\n")[2].partition("\n## 3 ")[0]
    found = []
    for row in re.findall(r"^\| (`.*)$", clause, re.MULTILINE):
        names, direction = (cell.strip() for cell in row.split(" | ")[:2])
        topics = [topic if "/" in topic else f"rd/{topic}" for topic in re.findall(r"`([^`]+)`", names)]
        topics = ["rd/now" if topic == "rd/rd/now" else topic for topic in topics]
        ways = ["all"] if direction == "down, all" else direction.split(", ")
        found += zip(topics, ways * (len(topics) if len(ways) == 1 else 1), strict=True)
    return found


def named(topic: str, device: str) -> str:
    values = {"device": device, "shard": "0", "round": "3", "chunk": "0", "channel": "stable", "sha": SHA}
    for name, value in values.items():
        topic = topic.replace(f"{{{name}}}", value)
    assert "{" not in topic
    return topic


@dataclass(frozen=True)
class Case:
    """Whether a client may read or write a topic."""

    topic: str
    way: str
    is_allowed: bool

    def __str__(self) -> str:
        return f"{self.way}-{self.topic.replace(SHA, 'sha')}-{'yes' if self.is_allowed else 'no'}"


def device_cases() -> list[Case]:
    cases = []
    for topic, direction in topic_table():
        for device in (OWN, OTHER) if "{device}" in topic else (OWN,):
            own, place = device == OWN, f"{BASE}/{named(topic, device)}"
            cases.append(Case(place, "write", own and direction == "up"))
            cases.append(Case(place, "read", own and direction != "up"))
        for base in (f"fl/1/{TENANT}/south", f"fl/1/zenith/{FLEET}"):
            cases += [Case(f"{base}/{named(topic, OWN)}", way, False) for way in ("read", "write")]
    return cases


def aggregator_cases() -> list[Case]:
    cases = []
    for topic, direction in topic_table():
        place = f"{BASE}/{named(topic, OTHER)}"
        cases.append(Case(place, "write", direction != "up"))
        # What is for all it may read, as every client.
        cases.append(Case(place, "read", direction in ("up", "all")))
        cases += [Case(f"fl/1/zenith/{FLEET}/{named(topic, OTHER)}", way, False) for way in ("read", "write")]
    return cases


# Near misses of the table: a right that ends in `#` would reach them, and nobody would ever clear what lies there.
NOT_IN_THE_TABLE = [
    "st",
    f"st/{OWN}/more",
    f"up/0/{OWN}",
    f"up/0/{OWN}/3",
    f"up/0/{OWN}/3/0/more",
    f"nd/{OWN}",
    f"nd/{OWN}/{SHA}/more",
    f"st/{OWN.upper()}",
    f"{OWN}/st",
    "rd/now/more",
    f"cm/{OWN}/more",
    f"xx/{OWN}",
]
OUTSIDE = ["elsewhere", f"fl/2/{TENANT}/{FLEET}/st/{OWN}", f"fl/1/{TENANT}/st/{OWN}", f"/{BASE}/st/{OWN}"]
FOREIGN = [
    *(Case(f"{BASE}/{topic}", "write", False) for topic in NOT_IN_THE_TABLE),
    *(Case(topic, way, False) for topic in OUTSIDE for way in ("read", "write")),
]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Cloud:
    return Cloud(tmp_path_factory.mktemp("operated"))


@pytest.fixture(scope="module")
def stage(cloud: Cloud) -> Iterator[Stage]:
    with operated(cloud, cloud.folder / "mosquitto") as running:
        yield running


@pytest.fixture(scope="module")
def unguarded(cloud: Cloud) -> Iterator[Stage]:
    """The positive control: the same broker without access rules."""
    with operated(cloud, cloud.folder / "unguarded", is_open=True) as running:
        yield running


def token() -> bytes:
    return secrets.token_hex(8).encode()


def arrives(stage: Stage, who: str, case: Case) -> bool:
    """Whether what is published there is delivered. A second publication of the same publisher to the same reader says
    when the first would have come."""
    secret, last = token(), token()
    end = f"{BASE}/{'ak/end' if who == AGGREGATOR else f'tm/{who}'}"
    with stage.join(who) as client, stage.join(OBSERVER) as observer:
        if case.way == "write":
            observer.subscribe("#")
            client.publish(case.topic, secret)
            client.publish(end, last)
            heard = observer.until(last)
        else:
            end = f"{BASE}/{'tm/end' if who == AGGREGATOR else f'cm/{who}'}"
            client.subscribe(case.topic, end)
            observer.publish(case.topic, secret)
            observer.publish(end, last)
            heard = client.until(last)
    return secret in [message.payload for message in heard]


@pytest.mark.parametrize("case", [*device_cases(), *FOREIGN], ids=str)
def test_device_reaches_a_topic_only_where_the_table_says_so(
    case: Case, stage: Stage, unguarded: Stage
) -> None:
    assert arrives(unguarded, OWN, case), "the control does not deliver: this case proves nothing"
    assert arrives(stage, OWN, case) == case.is_allowed


@pytest.mark.parametrize("case", aggregator_cases(), ids=str)
def test_aggregator_reads_what_goes_up_and_writes_what_goes_down(
    case: Case, stage: Stage, unguarded: Stage
) -> None:
    assert arrives(unguarded, AGGREGATOR, case)
    assert arrives(stage, AGGREGATOR, case) == case.is_allowed


def test_every_topic_of_the_table_is_a_case() -> None:
    kinds = {topic.partition("/")[0] for topic, _ in topic_table()}
    assert kinds >= {"st", "tm", "ir", "jn", "up", "nd", "rd", "md", "cm", "ak", "bl", "rs", "es", "ea"}
    assert dict(topic_table())["ea/{device}"] == "down"


# ---- filters that match much -------------------------------------------------------------------------------

HIDDEN = [
    *(f"{BASE}/{named(topic, OTHER)}" for topic, way in topic_table() if way != "all"),
    *(f"{BASE}/{named(topic, OWN)}" for topic, way in topic_table() if way == "up"),
    *(f"fl/1/zenith/{FLEET}/{named(topic, OWN)}" for topic, _ in topic_table()),
    *OUTSIDE,
]
SHOWN = [f"{BASE}/{named(topic, OWN)}" for topic, way in topic_table() if way != "up"]
FILTERS = [
    "#",
    "fl/#",
    "+/+/+/+/+/+",
    f"{BASE}/#",
    f"{BASE}/+/{OTHER}",
    f"{BASE}/cm/+",
    f"{BASE}/up/+/+/+/+",
    f"$share/group/{BASE}/#",
    f"$share/group/{BASE}/cm/{OTHER}",
    "$share/group/#",
]


def heard_under(stage: Stage, topic_filter: str) -> set[str]:
    last, end = token(), f"{BASE}/cm/{OWN}"
    with stage.join(OWN) as device, stage.join(OBSERVER) as observer:
        device.subscribe(topic_filter, end)
        for topic in (*HIDDEN, *SHOWN):
            observer.publish(topic, b"x")
        observer.publish(end, last)
        return {message.topic for message in device.until(last)}


@pytest.mark.parametrize("topic_filter", FILTERS)
def test_wide_filter_shows_a_device_nothing_that_is_not_its_own(
    topic_filter: str, stage: Stage, unguarded: Stage
) -> None:
    assert heard_under(unguarded, topic_filter) & set(HIDDEN)
    assert heard_under(stage, topic_filter) <= set(SHOWN)


def test_shared_subscription_of_a_device_takes_nothing_from_the_aggregator(stage: Stage) -> None:
    last, sent = token(), [token() for _ in range(8)]
    with stage.join(AGGREGATOR) as cloud, stage.join(OTHER) as thief, stage.join(OWN) as device:
        cloud.subscribe(f"{BASE}/up/+/+/+/+")
        thief.subscribe(f"$share/group/{BASE}/up/+/+/+/+", f"{BASE}/up/+/+/+/+")
        for number, payload in enumerate(sent):
            device.publish(f"{BASE}/up/0/{OWN}/1/{number}", payload)
        device.publish(f"{BASE}/up/0/{OWN}/1/9", last)
        assert [message.payload for message in cloud.until(last)] == sent
        thief.publish(f"{BASE}/tm/{OTHER}", b"still here")
        assert thief.received == []


def test_device_learns_nothing_of_the_broker_from_sys(stage: Stage, unguarded: Stage) -> None:
    def heard(at: Stage) -> set[str]:
        last, end = token(), f"{BASE}/cm/{OWN}"
        with at.join(OWN) as device, at.join(OBSERVER) as observer:
            device.subscribe("$SYS/#", end)
            observer.publish(end, last)
            return {message.topic for message in device.until(last)}

    assert "$SYS/broker/version" in heard(unguarded)
    assert heard(stage) <= {f"{BASE}/cm/{OWN}"}


# ---- retained messages and wills ---------------------------------------------------------------------------


def retained_by(stage: Stage, who: str, topic: str) -> list[bytes]:
    """What a later subscriber is given of what `who` published retained; and takes it away again."""
    secret, last = token(), token()
    with stage.join(who) as client, stage.join(OBSERVER) as observer:
        client.publish(topic, secret, retain=True)
        observer.subscribe(topic)
        observer.subscribe(f"{BASE}/tm/end")
        observer.publish(f"{BASE}/tm/end", last)
        heard = [message.payload for message in observer.until(last) if message.retain]
        observer.publish(topic, b"", retain=True)
    return heard if heard == [] or heard == [secret] else [b"of another test"]


@pytest.mark.parametrize(
    "topic", ["rd/now", "rd/3", "md/stable", f"bl/{SHA}/0", f"cm/{OTHER}", f"st/{OTHER}"]
)
def test_device_leaves_no_retained_message_for_others(topic: str, stage: Stage, unguarded: Stage) -> None:
    place = f"{BASE}/{topic}"
    assert len(retained_by(unguarded, OWN, place)) == 1
    assert retained_by(stage, OWN, place) == []


@pytest.mark.parametrize("topic", ["rd/now", "md/stable"])
def test_retained_message_of_the_aggregator_reaches_a_device_that_comes_later(
    topic: str, stage: Stage
) -> None:
    place, payload = f"{BASE}/{topic}", token()
    with stage.join(AGGREGATOR) as cloud:
        cloud.publish(place, payload, retain=True)
        with stage.join(OWN) as device:
            # A device cannot take it away either.
            assert device.publish(place, b"", retain=True) == NOT_AUTHORISED
        with stage.join(OTHER) as device:
            device.subscribe(place)
            assert device.until(payload) == []
        cloud.publish(place, b"", retain=True)


def test_retained_birth_of_a_device_is_for_the_aggregator_only(stage: Stage, unguarded: Stage) -> None:
    payload, place = token(), f"{BASE}/st/{OWN}"

    def seen(at: Stage, who: str) -> list[bytes]:
        last = token()
        with at.join(OWN) as device, at.join(who) as reader, at.join(OBSERVER) as observer:
            device.publish(place, payload, retain=True)
            end = f"{BASE}/tm/end" if who == AGGREGATOR else f"{BASE}/cm/{who}"
            reader.subscribe(f"{BASE}/st/+")
            reader.subscribe(end)
            observer.publish(end, last)
            return [message.payload for message in reader.until(last)]

    assert payload in seen(unguarded, OTHER)
    assert payload not in seen(stage, OTHER)
    assert payload in seen(stage, AGGREGATOR)


def last_will(stage: Stage, topic: str) -> bool:
    """Whether the will of a device that is cut off is delivered. A second connection of the same device makes the
    broker end the first, and then says when the will would have come."""
    will, last = token(), token()
    with stage.join(OBSERVER) as observer:
        observer.subscribe("#")
        with stage.join(OWN, will=(topic, will)), stage.join(OWN) as second:
            second.publish(f"{BASE}/tm/{OWN}", last)
            return will in [message.payload for message in observer.until(last)]


@pytest.mark.parametrize(
    "topic", [f"st/{OTHER}", "rd/now", "md/stable", f"cm/{OTHER}", f"ak/{OWN}", f"st/{OWN}/x"]
)
def test_will_on_a_foreign_topic_is_not_delivered(topic: str, stage: Stage, unguarded: Stage) -> None:
    assert last_will(unguarded, f"{BASE}/{topic}")
    assert not last_will(stage, f"{BASE}/{topic}")


def test_will_on_the_devices_own_topic_is_delivered(stage: Stage) -> None:
    assert last_will(stage, f"{BASE}/st/{OWN}")


# ---- names that are claimed --------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [OTHER, AGGREGATOR])
def test_client_id_that_is_claimed_is_not_believed(claimed: str, stage: Stage) -> None:
    """A valid certificate takes over no session of another's, nor what waits in it."""
    payload, place = token(), f"{BASE}/cm/{claimed}"
    with stage.join(claimed) as victim:
        victim.subscribe(f"{BASE}/cm/{claimed}", f"{BASE}/st/+")
        with (
            stage.join(OWN, client_id_claimed=claimed, clean=False) as thief,
            stage.join(OBSERVER) as observer,
        ):
            assert not thief.session_present
            thief.subscribe(place, f"{BASE}/cm/{OWN}")
            observer.publish(place, payload)
            observer.publish(f"{BASE}/cm/{OWN}", payload + b"end")
            assert thief.until(payload + b"end") == []
        # The victim was not thrown out.
        assert victim.subscribe(f"{BASE}/cm/{claimed}") == [1]


@pytest.mark.parametrize("claimed", [OTHER, AGGREGATOR, OBSERVER])
def test_user_name_that_is_claimed_is_not_believed(claimed: str, stage: Stage) -> None:
    with stage.join(OWN, user=claimed) as device:
        assert device.publish(f"{BASE}/st/{OTHER}", b"forged") == NOT_AUTHORISED
        assert device.publish(f"{BASE}/cm/{OTHER}", b"forged") == NOT_AUTHORISED
        assert device.publish(f"{BASE}/st/{OWN}", b"own") != NOT_AUTHORISED


def test_older_version_of_mqtt_opens_no_other_topics(stage: Stage, unguarded: Stage) -> None:
    """MQTT 3.1.1, under a claimed client id: a denied publication is swallowed without a word."""

    def heard(at: Stage) -> list[bytes]:
        last = token()
        context = at.cloud.context(OWN)
        with (
            at.join(OBSERVER) as observer,
            socket.create_connection(("127.0.0.1", at.port), DEADLINE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            observer.subscribe("#")
            hello = text("MQTT") + bytes([4, 2, 0, 60]) + text(OTHER)
            secured.sendall(bytes([CONNECT << 4]) + remaining_length(len(hello)) + hello)
            assert secured.recv(4) == b"\x20\x02\x00\x00"
            for topic, payload in (
                (f"st/{OTHER}", b"forged"),
                ("rd/now", b"forged too"),
                (f"tm/{OWN}", last),
            ):
                body = text(f"{BASE}/{topic}") + payload
                secured.sendall(bytes([PUBLISH << 4]) + remaining_length(len(body)) + body)
            return [message.payload for message in observer.until(last)]

    assert heard(unguarded)[-2:] == [b"forged", b"forged too"]
    assert not {b"forged", b"forged too"} & set(heard(stage))


@pytest.mark.parametrize("name", ["+", "#"])
def test_name_that_is_a_wildcard_has_no_rights(name: str, stage: Stage, unguarded: Stage) -> None:
    """The register refuses such names; if the authority ever signed one, the broker must not take it as a pattern."""

    def heard(at: Stage) -> int:
        with at.join(name) as device, at.join(OBSERVER) as observer:
            device.subscribe(f"{BASE}/cm/+", f"{BASE}/rd/+")
            observer.publish(f"{BASE}/cm/{OTHER}", b"order")
            observer.publish(f"{BASE}/rd/7", b"invitation")
            device.publish(
                f"{BASE}/st/{OWN}", b"forged"
            )  # its acknowledgement comes behind what is delivered
            return len(device.received)

    assert heard(unguarded) == 2
    assert heard(stage) == 0


# ---- limits ------------------------------------------------------------------------------------------------


def test_limits_are_told_to_every_client(stage: Stage) -> None:
    with stage.join(OWN) as device:
        assert int.from_bytes(device.welcome[MAXIMUM_PACKET], "big") == BrokerLimits().max_packet_bytes
        assert device.welcome[MAXIMUM_QOS] == b"\x01"


@pytest.mark.parametrize("asked", [0, 60_000])
def test_client_that_may_fall_silent_for_long_is_told_a_limit(asked: int, stage: Stage) -> None:
    with stage.join(OWN, keepalive_seconds=asked) as device:
        assert device.welcome[SERVER_KEEPALIVE] == (600).to_bytes(2, "big")


def test_packet_above_the_limit_ends_the_connection_and_reaches_nobody(stage: Stage) -> None:
    limit, place, last = BrokerLimits().max_packet_bytes, f"{BASE}/up/0/{OWN}/1/0", token()
    around = 1 + 3 + 2 + len(place) + 2 + 1  # type and length, topic, packet id, no properties
    with stage.join(AGGREGATOR) as cloud:
        cloud.subscribe(f"{BASE}/up/+/+/+/+", f"{BASE}/tm/+")
        with stage.join(OWN) as device, pytest.raises(Gone):
            device.publish(place, b"x" * limit)  # mosquitto does not count type and length
        with stage.join(OWN) as device:
            device.publish(place, b"y" * (limit - around))
            device.publish(f"{BASE}/tm/{OWN}", last)
        assert [message.payload[:1] for message in cloud.until(last)] == [b"y"]


def test_quality_of_service_2_ends_the_connection(stage: Stage) -> None:
    with stage.join(OWN) as device, pytest.raises(Gone):
        device.publish(f"{BASE}/tm/{OWN}", b"x", qos=2)

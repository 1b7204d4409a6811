"""What leaves first: an invitation before the chunks that it names, control messages before bulk."""

from __future__ import annotations

from cloud_server.downlink import Downlink
from cloud_server.sender import Sender
from fleet.virtual import VirtualTime
from wire.messages import Invitation, Need, TrainConfig
from wire.primitives import SigningKey
from wire.topics import Topics
from wire.transport import Received
from wire.transport.memory import MemoryBroker, MemoryTransport

TOPICS = Topics("t", "f")


class Cloud:
    """A mouth of the cloud, and the topics that a device hears, in order."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.broker = MemoryBroker(self.time)
        transport = MemoryTransport(self.broker, "aggregator")
        transport.start(lambda event: None, filters=[])
        self.heard: list[str] = []
        device = MemoryTransport(self.broker, "device")
        device.start(self._hear, filters=[("fl/1/t/f/#", 1)])
        self.broker.pump()
        self.sender = Sender(transport)
        key = SigningKey.generate()
        self.downlink = Downlink(
            topics=TOPICS, key=key, epoch=1, sender=self.sender, clock=self.time, chunk_bytes=1024
        )

    def topics(self) -> list[str]:
        """The third level of each topic that the device heard since the last call."""
        self.sender.pump()
        self.broker.pump()
        heard, self.heard = self.heard, []
        return [topic.split("/")[4] for topic in heard]

    def _hear(self, event: object) -> None:
        if isinstance(event, Received):
            self.heard.append(event.packet.topic)


def test_invitation_arrives_before_the_chunks_that_it_names() -> None:
    cloud = Cloud()
    ref = cloud.downlink.publish_blob(bytes(2500))
    cloud.downlink.send_invitation(
        Invitation(
            run="r",
            round_number=1,
            open=True,
            deadline=cloud.time.now() + 60.0,
            graphs_sha256=bytes(32),
            head=ref,
            train=TrainConfig(),
        )
    )
    assert cloud.topics() == ["rd", "bl", "bl", "bl"]


def test_same_content_is_broadcast_once_and_again_only_for_a_bitmap() -> None:
    cloud = Cloud()
    ref = cloud.downlink.publish_blob(bytes(2500))
    assert cloud.downlink.publish_blob(bytes(2500)) == ref
    assert cloud.topics() == ["bl", "bl", "bl"]
    cloud.time.advance_to(cloud.time.now() + 2.0)
    cloud.downlink.answer_need("dev", Need(sha256=ref.sha256, bitmap=b"\x05"))
    assert cloud.topics() == ["bl", "bl"]


def test_content_that_nobody_trains_on_is_kept_but_not_broadcast() -> None:
    cloud = Cloud()
    ref = cloud.downlink.publish_blob(bytes(2500), broadcast=False)
    assert cloud.topics() == []
    cloud.downlink.answer_need("dev", Need(sha256=ref.sha256, bitmap=b"\x02"))
    assert cloud.topics() == ["bl"]
    cloud.downlink.publish_blob(bytes(2500))
    assert cloud.topics() == ["bl", "bl"]

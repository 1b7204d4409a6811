"""The doors of a real agent: whatever comes through them gets an answer, and nothing stops for it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.vitals.status import read_status
from tests.edge.aggregator import Aggregator
from tests.edge.device_process import DeviceProcess
from tests.transport.conftest import FAST, KINDS
from tests.transport.mailbox import Mailbox
from wire.transport import Connected, Packet, Received
from wire.transport.broker import RunningBroker, start_broker
from wire.transport.mqtt import MqttTransport

SIZE = 12
WINDOW = np.linspace(-1, 1, SIZE).round(3).tolist()
TOPIC = "hall/windows"


def item(**values: object) -> bytes:
    return json.dumps(values).encode()


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


BAD_LINES = {
    "shape": (item(window=[1.0, 2.0], id="shape"), "the model takes"),
    "nan": (item(window=[float("nan")] * SIZE, id="nan"), "not finite"),
    "float32": (item(window=[1e39] * SIZE, id="float32"), "not finite"),
    "line 4": (b'{"window": [1, 2', "not JSON"),
    "never-seen": (item(id="never-seen", label=1), "is remembered"),
    "class": (item(window=WINDOW, id="class", label=3), "not one of the model's 3 classes"),
    "line 7": (b'{"window": [1], "id": "\\ud800"}', "an id is a text"),
    "line 8": (b"\xff\xfe\xfd", "not JSON"),
}


def test_bad_lines_are_answered_one_by_one_and_the_next_window_too(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with DeviceProcess(state, "-", token=aggregator.token()) as device:
        device.write(*[line for line, _ in BAD_LINES.values()])
        device.write(item(window=WINDOW, id="good"), item(id="good", label=2), item(id="good", label=2))
        assert device.answer("good")["release"] == 1
        device.wait_for(lambda: len(device.answers) == len(BAD_LINES) + 3, "all answers")
        for answer, (name, (_, words)) in zip(device.answers, BAD_LINES.items(), strict=False):
            assert answer["id"] == name
            assert words in answer["error"]
        assert [answer.get("accepted") for answer in device.answers[-2:]] == [True, None]
        assert "is remembered" in device.answers[-1]["error"]
    status = read_status(state)
    assert status is not None
    assert status["samples"]["labelled"] == 1


def test_bad_files_in_a_folder_are_answered_one_by_one_and_the_next_file_too(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    folder = tmp_path / "windows"
    folder.mkdir()
    three = np.tile(np.array(WINDOW, np.float32), (3, 1))
    three[1, 0] = np.nan
    (folder / "a-row.npy").write_bytes(npy(three))
    (folder / "b-shape.npy").write_bytes(npy(np.ones((2, 5))))
    (folder / "c-pickle.npy").write_bytes(npy(np.array([{}], dtype=object), allow_pickle=True))
    (folder / "d-row.csv").write_text(
        "\n".join([",".join(map(str, WINDOW)), "1,2", ",".join(map(str, WINDOW))])
    )
    (folder / "e-lone.labels.npy").write_bytes(npy(np.array([1])))
    (folder / "f-many.labels.npy").write_bytes(npy(np.array([1])))
    (folder / "f-many.npy").write_bytes(npy(three[::2]))
    with DeviceProcess(tmp_path / "state", str(folder), token=aggregator.token()) as device:
        for name, words in {
            "a-row.npy#1": "not finite",
            "b-shape.npy": "the model takes [12]",
            "c-pickle.npy": "not a .npy file of numbers",
            "d-row.csv": "row 2: 2 values, a window has 12",
            "e-lone.labels.npy": "there is no e-lone.npy",
            "f-many.npy": "for 2 windows",
        }.items():
            assert words in device.answer(name)["error"]
        (folder / "z-good.labels.npy").write_bytes(npy(np.array([0, 1])))
        (folder / "z-good.npy").write_bytes(npy(three[::2]))
        for name in (
            "a-row.npy#0",
            "a-row.npy#2",
            "d-row.csv#0",
            "d-row.csv#2",
            "z-good.npy#0",
            "z-good.npy#1",
        ):
            assert device.answer(name)["release"] == 1
        assert len({answer["id"] for answer in device.answers}) == len(device.answers) == 12


class Sensor:
    """A program beside the device: publishes to the topic and hears the answers."""

    def __init__(self, broker: RunningBroker) -> None:
        self._mailbox = Mailbox()
        self._transport = MqttTransport(
            "sensor", broker.host, broker.port, clean_start=True, session_expiry_seconds=0, backoff=FAST
        )
        self._transport.start(self._mailbox, filters=[(f"{TOPIC}/answers", 1)])
        self._mailbox.next(Connected)

    def publish(self, *payloads: bytes) -> None:
        for payload in payloads:
            self._transport.publish(Packet(TOPIC, payload))

    def hear(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._mailbox.next(Received).packet.payload)
        return answer

    def wait_until_connected(self) -> None:
        self._mailbox.next(Connected)

    def stop(self) -> None:
        self._transport.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_topic_of_a_local_broker_is_a_door_that_survives_bad_messages_and_the_broker(
    aggregator: Aggregator, tmp_path: Path, kind: Any
) -> None:
    with start_broker(kind, folder=tmp_path / "broker") as broker:
        url = f"mqtt://{broker.host}:{broker.port}/{TOPIC}"
        with DeviceProcess(tmp_path / "state", url, "-", token=aggregator.token()) as device:
            device.wait_for(lambda: "event=input_connected" in device.log, "the door")
            sensor = Sensor(broker)
            try:
                sensor.publish(item(window=WINDOW, id="w-1"), npy(np.array(WINDOW)))
                first, second = sensor.hear(), sensor.hear()
                assert (first["id"], first["release"], second["scores"]) == ("w-1", 1, first["scores"])
                sensor.publish(item(id="w-1", label=2))
                assert sensor.hear() == {"id": "w-1", "accepted": True}

                sensor.publish(b"nonsense", npy(np.ones(5)), npy(np.array(WINDOW))[:-3], b"", *[b"{}"] * 6)
                assert all("error" in sensor.hear() for _ in range(10))
                assert device.log.count("event=input_refused") == 2
                assert "total=10" in device.log

                broker.kill()
                device.wait_for(lambda: "event=input_broker_away" in device.log, "the door's word")
                device.write(item(window=WINDOW, id="meanwhile"))
                assert device.answer("meanwhile")["release"] == 1
                broker.revive()
                device.wait_for(lambda: device.log.count("event=input_connected") == 2, "the door again")
                sensor.wait_until_connected()
                sensor.publish(item(window=WINDOW, id="w-2"))
                assert sensor.hear()["release"] == 1
                assert device.answer("w-2")["scores"] == first["scores"]
            finally:
                sensor.stop()
    assert "input_failed" not in device.log

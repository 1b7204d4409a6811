"""When the aggregator starts its broker anew: at once when it has ended, and late when it is only slow."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cloud_server.broker import BUSY_SECONDS, BrokerCare
from tests.transport.conftest import needs_mosquitto
from wire.transport.broker import start_broker

pytestmark = needs_mosquitto


def test_broker_that_ended_is_started_anew_at_once(tmp_path: Path) -> None:
    with start_broker("mosquitto", folder=tmp_path) as broker:
        care = BrokerCare(broker)
        assert not care.look()
        broker.kill()
        assert care.look()
        assert not care.look()


def test_broker_that_is_too_busy_to_answer_is_left_alone_for_a_while(tmp_path: Path) -> None:
    """One that is stopped stands for one whose every turn is taken: it lives, and lets nobody in."""
    now = 0.0
    with start_broker("mosquitto", folder=tmp_path) as broker:
        care = BrokerCare(broker, lambda: now)
        first = broker.process_id
        os.kill(first, signal.SIGSTOP)
        now = BUSY_SECONDS - 1.0
        assert not care.look()
        os.kill(first, signal.SIGCONT)
        assert not care.look()
        os.kill(first, signal.SIGSTOP)
        now += BUSY_SECONDS - 1.0
        assert not care.look()
        assert broker.process_id == first
        now += 1.0
        assert care.look()
        assert broker.process_id != first
        assert broker.answers()

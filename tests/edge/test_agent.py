"""The agent against a cloud that is conducted by hand: rounds, releases, faults, forgeries."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from edge_agent import events as on
from edge_agent.release.memory_slots import MemorySlots
from edge_agent.settings import EdgeSettings, InferenceSettings, TrainingSettings
from edge_agent.store.storage import MEMORY, open_database
from tests.edge.lab import FLEET, TENANT, Lab, feed, windows
from wire.codec import decode
from wire.errors import DataError, ModelError, StorageError
from wire.messages import (
    Birth,
    Evaluation,
    InferenceReport,
    Join,
    Need,
    Receipt,
    Telemetry,
    TrainConfig,
    Update,
)
from wire.primitives import SigningKey, sha256
from wire.transport import Packet


def run_round(lab: Lab, *, kind: str = "train", number: int = 1, **order: object) -> None:
    """Invites, broadcasts, orders; a second of virtual training later everything is said."""
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params), round_number=number)
    lab.cloud.broadcast()
    lab.settle()
    lab.cloud.order("dev-1", kind, **order)
    lab.run(3)


def only_update(lab: Lab) -> Update:
    found = lab.cloud.of(Update)
    assert len(found) == 1
    assert isinstance(found[0].body, Update)
    return found[0].body


# --- birth and release ---


def test_agent_says_who_it_is_and_installs_the_release(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    births = [heard.body for heard in lab.cloud.of(Birth)]
    assert [(birth.status, birth.release_version) for birth in births] == [("online", 0), ("online", 1)]  # type: ignore[attr-defined]
    assert agent.parts.serving.current is not None
    assert births[1].release_sha256 == agent.parts.serving.current.release_sha256  # type: ignore[attr-defined]


def test_agent_that_is_lost_is_said_to_be_lost_and_one_that_stops_to_be_offline(lab: Lab) -> None:
    agent = lab.agent()
    lab.broker.cut("dev-1", for_seconds=5)
    lab.run(10)
    agent.stop()
    lab.broker.pump()
    assert [heard.body.status for heard in lab.cloud.of(Birth)][-3:] == ["lost", "online", "offline"]  # type: ignore[attr-defined]


def test_inference_before_the_first_release_is_a_model_error(lab: Lab) -> None:
    agent = lab.agent(source=lambda path: None)
    with pytest.raises(ModelError, match="no model"):
        agent.infer(np.zeros(12, np.float32))
    assert not agent.wait_for_model(0)


def test_agent_learns_of_a_release_by_the_announcement(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    lab.cloud.release(lab.cloud.candidate(lab.bundle.checkpoint().params * 2), 2)
    lab.run(5)
    assert agent.state.release_version == 2
    assert agent.infer(np.ones(12, np.float32)).release_version == 2


def test_release_is_confirmed_after_its_watch_window(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    assert agent.parts.slots.on_probation
    lab.run(70)
    assert not agent.parts.slots.on_probation
    assert agent.parts.serving.fallback is None


def test_agent_without_a_way_to_the_repository_keeps_trying_and_keeps_serving(lab: Lab) -> None:
    reachable = [True]
    agent = lab.agent(source=lambda path: lab.cloud.repository.read(path) if reachable[0] else None)
    lab.run(2)
    reachable[0] = False
    lab.cloud.release(lab.cloud.candidate(lab.bundle.checkpoint().params * 2), 2)
    lab.run(60)
    assert agent.infer(np.ones(12, np.float32)).release_version == 1
    assert agent.state.check_failures >= 2
    reachable[0] = True
    lab.run(300)
    assert agent.state.release_version == 2


# --- training ---


def test_round_gives_a_sealed_update_that_decodes_to_local_minus_global(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle, 50)
    run_round(lab)
    update = only_update(lab)
    vector = decode(update.payload, update.codec, update.params_size)
    assert vector.shape == (lab.bundle.manifest.params_size,)
    assert 0 < np.linalg.norm(vector) < 10.1
    assert update.num_examples == 40
    assert update.base_sha256 == lab.cloud.invitation.head.sha256
    assert update.metrics["loss_last"] < update.metrics["loss_first"]
    assert update.metrics["validation_examples"] == 10
    assert 0 <= update.metrics["accuracy_before"] <= 1
    assert [join.accepted for join in lab.joins()] == [True]


def test_receipt_empties_the_outbox_and_without_one_the_same_bytes_come_again(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    run_round(lab)
    lab.run(60)
    sent = lab.cloud.of(Update)
    assert len(sent) >= 3
    assert len({heard.transfer for heard in sent}) == 1
    lab.cloud.receipt("dev-1", sent[0])
    lab.settle()
    assert agent.parts.outbox.depth() == 0
    assert agent.parts.outbox.totals()["stored"] == 1
    lab.run(600)
    assert len(lab.cloud.of(Update)) == len(sent)


def test_missing_chunks_of_an_update_are_sent_again_alone(lab: Lab) -> None:
    lab.broker.max_packet_bytes = 1024 + 512
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    run_round(lab)
    update = lab.cloud.of(Update)[0]
    before = agent.parts.outgoing.sent_bytes_total
    lab.cloud.receipt("dev-1", update, "missing", missing=(1,), update_id=bytes(16))
    lab.settle()
    assert 0 < agent.parts.outgoing.sent_bytes_total - before <= 700


def test_lost_head_chunks_are_asked_for_by_bitmap(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params), chunk_bytes=1024)
    lab.cloud.order("dev-1")
    lab.cloud.broadcast(skip=(0,))
    lab.run(10)
    needs = [heard.body for heard in lab.cloud.of(Need)]
    assert needs
    assert needs[0].bitmap == b"\1"  # type: ignore[attr-defined]
    lab.cloud.broadcast()
    lab.run(3)
    assert only_update(lab)


def test_update_of_a_cut_connection_arrives_after_the_reconnection(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.settle()
    assert agent.state.phase == "training"
    lab.broker.cut("dev-1", for_seconds=30)
    lab.run(20)
    assert lab.cloud.of(Update) == []
    assert agent.parts.outbox.depth() == 1
    lab.run(20)
    assert only_update(lab)


def test_same_order_twice_gives_one_update(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    lab.cloud.broadcast()
    order = lab.cloud.order("dev-1")
    lab.cloud.send_order("dev-1", order)
    lab.run(3)
    lab.cloud.send_order("dev-1", order)
    lab.run(3)
    assert len({heard.transfer for heard in lab.cloud.of(Update)}) == 1
    assert len([result for result in lab.results if result.kind == "train"]) == 1
    assert len(lab.joins()) == 3


def test_replayed_order_message_is_dropped_without_an_answer(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    message = lab.cloud.send_order("dev-1", lab.cloud.order("dev-1"))
    lab.settle()
    joins = len(lab.joins())
    lab.cloud.transport.publish(Packet(lab.cloud.topics.by_device("cm", "dev-1"), message))
    lab.settle()
    assert len(lab.joins()) == joins
    assert agent.rejected_total == 1


def test_evaluation_gives_metrics_and_no_parameters(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle, 50)
    run_round(lab, kind="evaluate")
    (heard,) = lab.cloud.of(Evaluation)
    assert isinstance(heard.body, Evaluation)
    assert heard.body.num_examples == 10
    assert set(heard.body.metrics) == {"loss", "accuracy", "served_loss", "served_accuracy"}
    assert heard.header.type == "ev"


def test_evaluation_of_a_candidate_with_ranges_judges_its_int8_model(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle, 50)
    lab.cloud.invite(lab.cloud.candidate().checkpoint)
    lab.cloud.broadcast()
    lab.cloud.order("dev-1", "evaluate")
    lab.run(3)
    (heard,) = lab.cloud.of(Evaluation)
    model = agent.parts.serving.current
    assert model is not None
    x, y = agent.parts.samples.labelled("val")
    expected = float(np.mean(model.session.run(x).argmax(1) == y))
    metrics = heard.body.metrics  # type: ignore[attr-defined]
    assert metrics["accuracy"] == metrics["served_accuracy"] == pytest.approx(expected)
    assert metrics["loss"] == metrics["served_loss"]


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4", "int2", "sign", "dithered"])
def test_every_codec_of_the_wire_comes_out_of_a_device(lab: Lab, codec: str) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(
        lab.cloud.head_of(lab.bundle.checkpoint().params),
        config=TrainConfig(codec=codec),  # type: ignore[arg-type]
    )
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(3)
    update = only_update(lab)
    assert update.codec == codec
    assert np.isfinite(decode(update.payload, codec, update.params_size)).all()
    assert (agent.parts.database.fact("error_feedback") is not None) == (codec in ("int2", "sign"))


def test_two_labs_with_one_seed_give_the_same_update(lab: Lab, tmp_path: Path) -> None:
    other = Lab(lab.bundle, tmp_path / "other")
    other.cloud.release(other.cloud.candidate(), 1, announce=False)
    for one in (lab, other):
        agent = one.agent()
        one.run(2)
        feed(agent, one.bundle)
        run_round(one)
    assert only_update(lab) == only_update(other)


# --- declining ---


def decline_reason(lab: Lab) -> str:
    (join,) = [join for join in lab.joins() if not join.accepted]
    return join.reason


def test_device_without_labels_declines(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    agent.observe(np.zeros(12, np.float32))
    run_round(lab)
    assert decline_reason(lab) == "no labelled samples"


def test_device_without_a_model_yet_accepts_with_samples_that_have_no_labels(lab: Lab) -> None:
    agent = lab.agent(source=lambda path: None)
    lab.run(2)
    agent.observe(np.zeros(12, np.float32))
    run_round(lab)
    assert [join.accepted for join in lab.joins()] == [True]


def test_device_without_a_model_and_without_samples_declines(lab: Lab) -> None:
    lab.agent(source=lambda path: None)
    lab.run(2)
    run_round(lab)
    assert decline_reason(lab) == "no samples"


def test_device_that_does_not_train_declines(lab: Lab) -> None:
    settings = EdgeSettings(training=TrainingSettings(enabled=False))
    agent = lab.agent(settings=settings)
    lab.run(2)
    feed(agent, lab.bundle)
    run_round(lab)
    assert "switched off" in decline_reason(lab)


def test_head_that_never_comes_is_declined_at_the_deadline(lab: Lab) -> None:
    feed(lab.agent(), lab.bundle)
    lab.run(2)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params), seconds=20)
    lab.cloud.order("dev-1")
    lab.run(30)
    assert decline_reason(lab) == "no head in time"


def test_head_of_other_graphs_is_declined(lab: Lab) -> None:
    feed(lab.agent(), lab.bundle)
    lab.run(2)
    head = lab.cloud.head_of(lab.bundle.checkpoint().params)
    lab.cloud.invite(head, seconds=20, graphs=b"g" * 32)
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(30)
    assert decline_reason(lab) == "graphs unknown"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"overrides": {"epochs": 0}}, "overrides"),
        ({"slot_bytes": 300}, "the slot has 300"),
    ],
)
def test_order_that_cannot_be_fulfilled_is_declined_and_the_next_one_works(
    lab: Lab, change: dict[str, object], reason: str
) -> None:
    feed(lab.agent(), lab.bundle)
    lab.run(2)
    run_round(lab, **change)
    assert reason in decline_reason(lab)
    run_round(lab, number=2)
    assert only_update(lab).round_number == 2


def test_head_larger_than_the_device_accepts_is_not_gathered(lab: Lab) -> None:
    agent = lab.agent(settings=EdgeSettings(training=TrainingSettings(max_head_bytes=1024)))
    lab.run(2)
    feed(agent, lab.bundle)
    run_round(lab, deadline=lab.time.now() + 1.5)
    lab.run(5)
    assert lab.cloud.of(Update) == []
    assert decline_reason(lab) == "no head in time"


# --- who may say what ---


def test_order_signed_by_another_key_does_nothing_but_a_release_check(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    checks = len(lab.results)
    order = lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    forged = SigningKey.from_bytes(b"f" * 32)
    topic = lab.cloud.topics.by_device("cm", "dev-1")
    body = lab.cloud.order("dev-2", head_sha256=order.head.sha256)
    lab.cloud.say(body, device="dev-1", topic=topic, key=forged)
    lab.run(3)
    assert lab.joins() == []
    assert agent.rejected_total == 1
    assert [result.kind for result in lab.results[checks:]] == ["update"]


def test_order_for_another_device_on_this_topic_is_dropped(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    order = lab.cloud.order("dev-2")
    lab.cloud.say(order, device="dev-2", topic=lab.cloud.topics.by_device("cm", "dev-1"))
    lab.settle()
    assert (lab.joins(), agent.rejected_total) == ([], 1)


@pytest.mark.parametrize("changes", [{"transfer": b"x" * 32}, {"update_id": b"y" * 16}])
def test_receipt_for_other_bytes_does_not_empty_the_outbox(lab: Lab, changes: dict[str, bytes]) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    run_round(lab)
    lab.cloud.receipt("dev-1", lab.cloud.of(Update)[0], **changes)
    lab.settle()
    assert agent.parts.outbox.depth() == 1
    assert len(agent.state.uploads) == 1


def test_garbage_is_counted_and_dropped(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    base = f"fl/1/{TENANT}/{FLEET}"
    for topic in (f"{base}/cm/dev-1", f"{base}/rd/now", f"{base}/ak/dev-1", f"{base}/md/stable"):
        for payload in (b"", b"\0" * 40, b"\xff" * 5000):
            lab.cloud.transport.publish(Packet(topic, payload))
    lab.cloud.transport.publish(Packet(f"{base}/bl/{'0' * 64}/3", b"nobody asked"))
    lab.settle()
    assert agent.rejected_total == 12
    assert agent.infer(np.ones(12, np.float32)).release_version == 1


def test_chunk_with_a_wrong_hash_is_dropped_and_the_right_one_taken(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    invitation = lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    topic = lab.cloud.topics.blob_chunk(invitation.head.sha256.hex(), 0)
    lab.cloud.transport.publish(Packet(topic, b"wrong"))
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(3)
    assert agent.rejected_total == 1
    assert only_update(lab)


# --- restarts and full disks ---


def test_update_survives_a_restart_and_is_trained_once(lab: Lab) -> None:
    database = open_database(MEMORY, clock=lab.time)
    slots = MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots)
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    lab.cloud.broadcast()
    order = lab.cloud.order("dev-1")
    lab.run(3)
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    again = lab.agent(database=database, slots=slots)
    lab.cloud.send_order("dev-1", order)
    lab.run(3)
    sent = lab.cloud.of(Update)
    assert len({heard.transfer for heard in sent}) == 1
    assert len([result for result in lab.results if result.kind == "train"]) == 1
    lab.cloud.receipt("dev-1", sent[-1])
    lab.settle()
    assert again.parts.outbox.depth() == 0


def test_agent_that_dies_in_training_says_so_when_it_is_back(lab: Lab) -> None:
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots)
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    lab.cloud.broadcast()
    lab.settle()
    order = lab.cloud.order("dev-1")
    lab.settle()
    assert agent.state.phase == "training"
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    lab.agent(database=database, slots=slots)
    lab.run(5)
    assert decline_reason(lab) == "the agent was restarted"
    lab.cloud.send_order("dev-1", order)
    lab.run(1)
    lab.cloud.broadcast()
    lab.run(3)
    assert only_update(lab).order_id == order.order_id


def test_release_that_does_not_survive_two_starts_on_probation_goes_back(lab: Lab) -> None:
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    lab.agent(database=database, slots=slots)
    lab.run(100)
    lab.cloud.release(lab.cloud.candidate(lab.bundle.checkpoint().params * 2), 2)
    lab.run(5)
    assert slots.on_probation
    for expected in (2, 1):
        lab.agents.clear()
        lab.broker.cut("dev-1", for_seconds=1e9)
        agent = lab.agent(database=database, slots=slots, source=lambda path: None)
        assert agent.infer(np.ones(12, np.float32)).release_version == expected


def test_release_on_probation_survives_stops_that_were_asked_for(lab: Lab, tmp_path: Path) -> None:
    slots = MemorySlots(lab.shared)
    for start in range(4):
        agent = lab.agent(database=open_database(tmp_path, clock=lab.time), slots=slots)
        lab.run(2)
        assert slots.on_probation
        assert agent.infer(np.ones(12, np.float32)).release_version == 1, f"start {start}"
        agent.stop()
        lab.agents.clear()


@pytest.mark.parametrize("label", [-1, 99])
def test_label_that_the_model_does_not_have_is_refused(lab: Lab, label: int) -> None:
    agent = lab.agent()
    lab.run(2)
    answer = agent.infer(np.ones(12, np.float32))
    with pytest.raises(DataError, match="not one of the model's"):
        agent.observe(np.ones(12, np.float32), label)
    with pytest.raises(DataError, match="not one of the model's"):
        agent.feedback(answer.sample_id, label)
    assert agent.feedback(answer.sample_id, 0)


def test_full_disk_costs_the_update_but_not_the_answers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)

    def full(*_: object, **__: object) -> bool:
        raise StorageError("database: disk is full", full=True)

    monkeypatch.setattr(agent.parts.outbox, "put", full)
    run_round(lab)
    assert "disk is full" in decline_reason(lab)
    assert agent.state.uploads == ()
    assert agent.infer(np.ones(12, np.float32)).release_version == 1


def test_update_that_nobody_receipts_expires(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    run_round(lab)
    lab.run(60 + 600 + 120)
    assert agent.parts.outbox.totals()["expired"] == 1
    assert agent.state.uploads == ()


# --- answers, feedback, reports ---


def test_answer_names_class_scores_and_release(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    answer = agent.infer(windows(lab.bundle, 1)[0][0])
    assert answer.scores.shape == (3,)
    assert answer.scores.sum() == pytest.approx(1.0, abs=1e-5)
    assert answer.label == int(answer.scores.argmax())


@pytest.mark.parametrize(
    "window", [np.zeros(11, np.float32), np.zeros((2, 12), np.float32), np.full(12, np.nan, np.float32)]
)
def test_window_that_does_not_fit_is_the_callers_error(lab: Lab, window: np.ndarray) -> None:  # type: ignore[type-arg]
    agent = lab.agent()
    lab.run(2)
    with pytest.raises(DataError):
        agent.infer(window)
    assert (agent.parts.serving.bad_input_total, agent.parts.serving.total.errors) == (1, 0)
    assert agent.parts.slots.current() is not None


def test_feedback_turns_an_answered_window_into_a_sample_once(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    x, _ = windows(lab.bundle, 1)
    answer = agent.infer(x[0])
    assert agent.feedback(answer.sample_id, answer.label or 0)
    assert not agent.feedback(answer.sample_id, 1)
    assert not agent.feedback("unknown", 1)
    assert agent.parts.samples.counts()["labelled"] == 1
    kept = [agent.parts.samples.labelled(split)[0] for split in ("train", "val")]  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate([k for k in kept if len(k)])[0], x[0])


def test_windows_wait_for_feedback_only_so_long(lab: Lab) -> None:
    agent = lab.agent(settings=EdgeSettings(inference=InferenceSettings(recent_windows=2)))
    lab.run(2)
    names = [agent.infer(window).sample_id for window in windows(lab.bundle, 3)[0]]
    assert [agent.feedback(name, 0) for name in names] == [False, True, True]


def test_report_and_telemetry_are_sealed_and_say_what_happened(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    for window in windows(lab.bundle, 5)[0]:
        answer = agent.infer(window)
    agent.feedback(answer.sample_id, answer.label or 0)
    lab.run(1200)
    telemetry = [heard.body for heard in lab.cloud.of(Telemetry)]
    reports = [heard.body for heard in lab.cloud.of(InferenceReport)]
    assert isinstance(telemetry[-1], Telemetry)
    assert isinstance(reports[0], InferenceReport)
    assert (telemetry[-1].requests_total, telemetry[-1].labelled_samples) == (5, 1)
    assert (reports[0].requests, reports[0].errors, sum(reports[0].label_counts)) == (5, 0, 5)
    assert (reports[0].feedback_correct, reports[0].feedback_total) == (1, 1)
    assert isinstance(reports[1], InferenceReport)
    assert reports[1].requests == 0, "a report counts from the one before"


# --- swapping ---


def test_swap_under_load_loses_no_request(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    x, _ = windows(lab.bundle, 16)
    stop, errors, seen = threading.Event(), [], set()

    def ask() -> None:
        number = 0
        while not stop.is_set():
            try:
                seen.add(agent.infer(x[number % 16]).release_version)
            except Exception as error:  # noqa: BLE001  the test counts whatever gets lost
                errors.append(error)
            number += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(2, 6):
        params = lab.bundle.checkpoint().params * np.float32(1 + version / 10)
        lab.cloud.release(lab.cloud.candidate(params), version)
        lab.run(5)
    stop.set()
    for thread in threads:
        thread.join()
    serving = agent.parts.serving
    assert errors == []
    assert seen <= {1, 2, 3, 4, 5}
    assert [(swap.from_version, swap.to_version) for swap in serving.swaps] == [
        (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)
    ]  # fmt: skip
    assert serving.total.errors == 0
    assert sum(swap.counts.requests for swap in serving.swaps) == serving.total.requests
    assert sum(counts.requests for counts in serving.by_release.values()) == serving.total.requests


class Broken:
    """A session that fails as a real one would."""

    def run(self, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        raise ModelError("the model failed while it ran: injected")


def test_release_that_fails_on_a_request_is_answered_by_its_predecessor_and_rolled_back(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(100)
    good = agent.parts.serving.current
    lab.cloud.release(lab.cloud.candidate(lab.bundle.checkpoint().params * 2), 2)
    lab.run(5)
    model = agent.parts.serving.current
    assert model is not None
    broken = type(model)(**{**{f: getattr(model, f) for f in model.__slots__}, "session": Broken()})
    agent.parts.serving.swap(broken, good)
    assert agent.infer(np.ones(12, np.float32)).release_version == 1
    lab.run(5)
    assert agent.state.release_version == 1
    assert agent.parts.serving.by_release[2].errors == 1
    assert lab.cloud.of(Birth)[-1].body.release_version == 1  # type: ignore[attr-defined]
    lab.run(600)
    assert agent.state.release_version == 1, "a release that failed here must not come back"


def test_release_with_a_wrong_golden_answer_never_serves(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    candidate = lab.cloud.candidate(lab.bundle.checkpoint().params * 2)
    golden = np.frombuffer(candidate.golden_outputs, "<f4") + np.float32(50)
    wrong = type(candidate)(**{**vars(candidate), "golden_outputs": golden.tobytes()})
    lab.cloud.release(wrong, 2)
    lab.run(120)
    assert agent.state.release_version == 1
    assert any("SelfTestError" in result.error for result in lab.results)


# --- odd inputs of the loop itself ---


def test_refused_publication_is_counted_and_the_agent_goes_on(lab: Lab) -> None:
    from wire.transport import Published

    agent = lab.agent()
    agent.handle(Published(1, accepted=False, reason="not authorized"))
    assert agent.rejected_total == 1


def test_stop_twice_is_stop_once(lab: Lab) -> None:
    agent = lab.agent()
    agent.stop()
    agent.stop()
    assert [heard.body for heard in lab.cloud.of(Join)] == []


def test_run_forever_ends_when_it_is_told_and_survives_what_it_cannot_handle(lab: Lab) -> None:
    agent = lab.agent()
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        agent.wake()
        return asked > 3

    agent._post("no event")  # type: ignore[arg-type]
    agent.run_forever(should_stop)
    assert agent.state.phase in ("idle", "updating")


def test_wrong_clock_declines_rounds_and_goes_on_answering(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params))
    lab.cloud.broadcast()
    lab.settle()
    order = lab.cloud.order("dev-1")
    lab.time.wall_offset += 10 * 365 * 86_400
    lab.settle()
    lab.run(1)
    assert [join.reason for join in lab.joins() if join.order_id == order.order_id][-1:] == [
        "deadline passed"
    ]
    assert agent.infer(np.ones(12, np.float32)).release_version == 1


def test_receipts_and_state_agree_on_what_is_owed(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle)
    for number in range(1, 4):
        run_round(lab, number=number)
    updates = {heard.body.update_id: heard for heard in lab.cloud.of(Update)}  # type: ignore[attr-defined]
    assert len(updates) == 3
    verdicts = ("stored", "refused", "duplicate")
    for heard, verdict in zip(updates.values(), verdicts, strict=True):
        lab.cloud.receipt("dev-1", heard, verdict)
    lab.settle()
    totals = agent.parts.outbox.totals()
    assert (totals["stored"], totals["refused"], agent.parts.outbox.depth()) == (2, 1, 0)
    assert agent.state.uploads == ()


def test_receipt_types_are_those_of_the_wire() -> None:
    receipt = Receipt(update_id=bytes(16), transfer=sha256(b""), verdict="stored")
    assert on.ReceiptArrived(receipt.update_id, receipt.verdict, receipt.transfer).missing == ()

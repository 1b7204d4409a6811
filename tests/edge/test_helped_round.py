"""A device in a round with a helper: whom it seals its seed to, and whom not."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.rounds.helped_round import HelpedMasking
from edge_agent.rounds.helper_pin import HELPER_FACT, HelperPin
from edge_agent.rounds.masked_rounds import Draft, MaskedRounds
from edge_agent.settings import EdgeSettings, TrainingSettings
from edge_agent.store.storage import MEMORY, Database, open_database
from edge_agent.uplink.hearing import refusal_of
from fleet.virtual import VirtualTime
from tests.cloud.helper_lab import FLEET, TENANT, HelperLab, Sealer
from tests.edge.lab import FLEET as LAB_FLEET
from tests.edge.lab import TENANT as LAB_TENANT
from tests.edge.lab import Lab
from tests.edge.test_masked_rounds import masked_order
from tests.edge.test_state import invitation, order, run, started
from wire.errors import ConfigurationError, MessageError
from wire.helper import HELPER_JSON, helped_context, helped_mask_key, helper_json, read_question
from wire.messages import MaskInbox, Order
from wire.primitives import KemPrivateKey, KemPublicKey
from wire.ring import add_mask

KEY = (1).to_bytes(16, "big")
HELPER, OTHER = KemPrivateKey.generate().public_key, KemPrivateKey.generate().public_key


class Me:
    tenant, fleet, device = TENANT, FLEET, "d000"

    def __init__(self, lab: HelperLab) -> None:
        self.update_key = lab.keys[self.device]


class Known:
    """What the device knows of its helper now."""

    def __init__(self, key: KemPublicKey | None) -> None:
        self.key = key

    def __call__(self) -> KemPublicKey | None:
        return self.key


def rounds_of(lab: HelperLab, known: Known) -> MaskedRounds:
    return MaskedRounds(
        Me(lab),  # type: ignore[arg-type]
        random=random.Random(1).randbytes,
        min_members=3,
        helper=known,
        seal=Sealer("d000", lab.keys["d000"]),
    )


def test_update_leaves_under_its_mask_with_its_seed_once() -> None:
    lab = HelperLab(3)
    rounds, wanted = rounds_of(lab, Known(lab.kem.public_key)), lab.order()
    assert rounds.begin(wanted) is None
    assert rounds.finish(wanted.order_id) is None
    rounds.hold(Draft(b"u" * 16, wanted, lab.vectors["d000"], steps=1))
    update = rounds.finish(wanted.order_id)
    assert update is not None
    assert (update.num_examples, update.metrics, update.buffers) == (1, {}, b"")
    sent = np.frombuffer(update.payload, lab.ring.dtype)
    assert np.count_nonzero(sent == lab.vectors["d000"]) < len(sent) / 4
    assert update.sealed_seed
    assert rounds.finish(wanted.order_id) is None


def test_update_waits_until_the_helper_is_known() -> None:
    lab = HelperLab(3)
    known = Known(None)
    rounds, wanted = rounds_of(lab, known), lab.order()
    rounds.begin(wanted)
    rounds.hold(Draft(b"u" * 16, wanted, lab.vectors["d000"], steps=1))
    assert rounds.finish(wanted.order_id) is None
    known.key = OTHER
    assert rounds.finish(wanted.order_id) is None
    known.key = lab.kem.public_key
    assert rounds.finish(wanted.order_id) is not None


def test_seed_is_fresh_for_every_order_and_masks_one_vector() -> None:
    lab = HelperLab(3)
    masking = HelpedMasking(
        lab.order(), tenant=TENANT, fleet=FLEET, helper=Known(lab.kem.public_key),
        random=random.Random(1).randbytes, min_devices=3, seal=Sealer("d000", lab.keys["d000"]),
    )  # fmt: skip
    masked, _ = masking.mask(lab.vectors["d000"])
    assert not masking.is_ready
    with pytest.raises(MessageError):
        masking.mask(lab.vectors["d001"])
    again, _ = lab.mask("d000", lab.order(2))
    assert np.count_nonzero(masked == again) < lab.size / 4


@pytest.mark.parametrize("changes", [{"kind": "evaluate"}, {"helped": None}], ids=["evaluation", "no terms"])
def test_order_that_is_none_of_a_helper_is_refused(changes: dict[str, Any]) -> None:
    lab = HelperLab(3)
    with pytest.raises(MessageError):
        lab.mask("d000", msgspec.structs.replace(lab.order(), **changes))


def test_terms_whose_sum_would_overflow_are_refused() -> None:
    lab = HelperLab(3)
    with pytest.raises(MessageError):
        lab.mask("d000", lab.order(value_bits=31))


def test_round_with_a_helper_has_no_messages_of_neighbours() -> None:
    lab = HelperLab(3)
    rounds = rounds_of(lab, Known(lab.kem.public_key))
    rounds.begin(lab.order())
    with pytest.raises(MessageError):
        rounds.hear(MaskInbox(order_id=lab.order().order_id, pieces=()))


def test_seed_that_the_helper_opens_takes_the_mask_away() -> None:
    lab = HelperLab(3)
    masked, sealed = lab.mask("d000")
    question = read_question(lab.question([sealed]))
    seeds, unusable = lab.helper._open_all(question)
    assert (list(seeds), unusable) == ([0], [])
    context = helped_context(TENANT, FLEET, "run", 1, lab.terms)
    add_mask(masked, helped_mask_key(context, seeds[0].seed), negative=True)
    assert np.array_equal(masked, lab.vectors["d000"])


# --- the state machine ---


def helped_order(**changes: Any) -> Order:
    return msgspec.structs.replace(order(**changes), helped=HelperLab(3).terms)


def test_order_with_an_unknown_helper_is_taken_and_a_check_made_soon() -> None:
    state = replace(started(), check_at=10_000.0)
    state, actions = run(state, on.OrderArrived(helped_order(), is_news=True))
    assert [type(action) for action in actions] == [do.RememberOrder, do.PublishJoin, do.BeginMasking]
    assert state.check_at < 10_000.0


def test_update_is_masked_when_a_check_brought_the_helper() -> None:
    state, _ = run(started(), on.InvitationArrived(invitation()), on.OrderArrived(helped_order()))
    state, _ = run(state, on.HeadReady(invitation().head.sha256))
    state, actions = run(state, on.DraftDone(KEY, steps=3))
    assert any(isinstance(action, do.MaskUpdate) for action in actions)
    state = replace(state, phase="updating")
    _, actions = run(state, on.ReleaseInstalled(state.release_version, state.graphs_sha256))
    assert [action.order_id for action in actions if isinstance(action, do.MaskUpdate)] == [KEY]


# --- by whose key it knows its helper ---


def pin(database: Database, pinned: str = "") -> HelperPin:
    return HelperPin(pinned, database, tenant=TENANT, fleet=FLEET)


@pytest.fixture
def database() -> Database:
    return open_database(MEMORY, clock=VirtualTime())


def test_settings_go_before_signed_metadata(database: Database) -> None:
    mine = pin(database, HELPER.public_bytes.hex())
    mine.take(helper_json(TENANT, FLEET, OTHER))
    assert (mine.is_pinned, mine.key) == (True, mine.key)
    assert mine.key is not None
    assert mine.key.key_id == HELPER.key_id


def test_helper_of_the_last_check_is_known_after_a_restart(database: Database) -> None:
    first = pin(database)
    assert first.key is None
    first.take(helper_json(TENANT, FLEET, HELPER))
    again = pin(database)
    assert again.key is not None
    assert again.key.key_id == HELPER.key_id
    again.take(b"")
    assert again.key is None
    assert pin(database).key is None


@pytest.mark.parametrize("signed", [b"{}", b"\xff", helper_json("x", FLEET, HELPER)])
def test_signed_file_that_names_no_helper_of_ours_leaves_the_device_without(
    database: Database, signed: bytes
) -> None:
    mine = pin(database)
    mine.take(helper_json(TENANT, FLEET, HELPER))
    mine.take(signed)
    assert mine.key is None
    database.set_fact(HELPER_FACT, signed)
    assert pin(database).key is None


def test_hybrid_key_can_be_pinned(database: Database) -> None:
    hybrid = KemPrivateKey.generate("mlkem768-x25519").public_key
    key = pin(database, hybrid.public_bytes.hex()).key
    assert key is not None
    assert (key.algorithm, key.key_id) == ("mlkem768-x25519", hybrid.key_id)


@pytest.mark.parametrize("pinned", ["00", "zz" * 32])
def test_pin_that_is_no_key_is_said_at_the_start(database: Database, pinned: str) -> None:
    with pytest.raises(ConfigurationError):
        pin(database, pinned)


# --- release metadata ---


def test_helper_comes_by_the_offline_key(lab: Lab) -> None:
    lab.cloud.repository.set_helper(helper_json(LAB_TENANT, LAB_FLEET, HELPER))
    agent = lab.agent()
    lab.run(5)
    assert agent.parts.helper.key is not None
    assert agent.parts.helper.key.key_id == HELPER.key_id


def test_helper_that_an_online_role_names_is_not_believed(lab: Lab) -> None:
    """Who stole the aggregator's online keys, or runs it, cannot put a key of its own in the helper's place."""
    repository = lab.cloud.repository
    forged = helper_json(LAB_TENANT, LAB_FLEET, OTHER)
    for role in ("keys", "parameters", "rings"):
        repository._change(
            lambda current, role=role: repository._add_files(current, role, {HELPER_JSON: forged})
        )
    agent = lab.agent()
    lab.run(5)
    assert agent.parts.speaker.keys.orders
    assert agent.parts.helper.key is None


@pytest.mark.parametrize(
    ("training", "helped", "said"),
    [
        (TrainingSettings(masked_only=True, helper_key=HELPER.public_bytes.hex()), False, "masks"),
        (TrainingSettings(helper_key=OTHER.public_bytes.hex()), True, "another helper"),
        (TrainingSettings(min_masked=4), True, "fewer than 4"),
        (TrainingSettings(), True, ""),
    ],
    ids=["pairwise declined", "another helper", "too few", "taken"],
)
def test_device_declines_what_its_settings_do_not_want(
    lab: Lab, training: TrainingSettings, helped: bool, said: str
) -> None:
    agent = lab.agent(settings=EdgeSettings(training=training))
    terms = msgspec.structs.replace(HelperLab(3).terms, helper_key_id=HELPER.key_id)
    wanted = msgspec.structs.replace(order(), helped=terms) if helped else masked_order()
    refusal = refusal_of(wanted, agent.parts)
    assert said in refusal if said else "helper" not in refusal


def test_device_follows_a_helper_with_a_new_key(lab: Lab) -> None:
    """Its key was lost or stolen: the offline key names another, and the first order that does makes devices look."""
    repository = lab.cloud.repository
    repository.set_helper(helper_json(LAB_TENANT, LAB_FLEET, HELPER))
    agent = lab.agent()
    lab.run(5)
    repository.set_helper(helper_json(LAB_TENANT, LAB_FLEET, OTHER))
    lab.run(5)
    assert agent.parts.helper.key is not None
    assert agent.parts.helper.key.key_id == HELPER.key_id
    terms = msgspec.structs.replace(HelperLab(3).terms, helper_key_id=OTHER.key_id)
    lab.cloud.invite(lab.bundle.checkpoint())
    lab.cloud.order("dev-1", helped=terms)
    lab.run(30)
    assert agent.parts.helper.key.key_id == OTHER.key_id

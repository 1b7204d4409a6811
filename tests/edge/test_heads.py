"""Heads on their way in: a patch where its base is here, the whole head where it is not, and never a wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.rounds.heads import Heads, Progress
from tests.edge.lab import Lab, feed
from wire.blobs import make_ref
from wire.checkpoint import Checkpoint
from wire.errors import ChunkError
from wire.messages import BlobRef, HeadPatch, Invitation, Need, TrainConfig, Update
from wire.patch import apply_patch, make_patch
from wire.transport import Packet

LIMIT = 2**20
RANGES = np.zeros((0, 2), np.float32)
NONE = np.zeros(0, np.float32)


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(np.random.default_rng(number).standard_normal(2000).astype(np.float32), NONE, RANGES)


BASE = checkpoint(1)
PATCH = make_patch(BASE, checkpoint(2), "dithered", 3)
HEAD = apply_patch(BASE, PATCH)


def blob(data: bytes) -> tuple[BlobRef, list[bytes]]:
    return make_ref(data, 1024)


def offer(patch: bytes = PATCH, base: Checkpoint = BASE) -> HeadPatch:
    return HeadPatch(base_sha256=base.sha256, blob=blob(patch)[0])


def give(heads: Heads, data: bytes) -> list[Progress | None]:
    ref, chunks = blob(data)
    return [heads.add(ref.sha256, index, chunk) for index, chunk in enumerate(chunks)]


def heads_with_base() -> Heads:
    heads = Heads(LIMIT)
    heads.gather(blob(BASE.to_bytes())[0])
    give(heads, BASE.to_bytes())
    return heads


def invitation(**changes: Any) -> Invitation:
    facts: dict[str, Any] = {
        "run": "r",
        "round_number": 2,
        "open": True,
        "deadline": 1e9,
        "graphs_sha256": b"g" * 32,
        "head": blob(HEAD.to_bytes())[0],
        "train": TrainConfig(),
        "head_on_need": True,
        "patch": offer(),
    }
    return Invitation(**{**facts, **changes})


def test_patch_on_a_head_that_is_here_leads_to_the_next() -> None:
    heads = heads_with_base()
    assert heads.gather(blob(HEAD.to_bytes())[0], offer()) is False
    need = heads.need(HEAD.sha256)
    assert need is not None
    assert need.sha256 == offer().blob.sha256
    progress = give(heads, PATCH)
    assert progress[-1] == Progress(HEAD.sha256, True)
    assert heads.read(HEAD.sha256) == HEAD.to_bytes()
    assert heads.read(BASE.sha256) == BASE.to_bytes()


def test_patch_without_its_base_is_not_gathered_and_the_whole_head_is() -> None:
    heads = Heads(LIMIT)
    heads.gather(blob(HEAD.to_bytes())[0], offer())
    assert give(heads, PATCH) == [None] * len(blob(PATCH)[1])
    need = heads.need(HEAD.sha256)
    assert need is not None
    assert need.sha256 == HEAD.sha256
    assert give(heads, HEAD.to_bytes())[-1] == Progress(HEAD.sha256, True)


def damaged() -> bytes:
    """A patch that decodes, and leads elsewhere."""
    return make_patch(BASE, checkpoint(5), "dithered", 3)


@pytest.mark.parametrize(
    "patch",
    [b"no patch at all", PATCH[:-1], PATCH + b"\0", damaged(), make_patch(HEAD, BASE, "int8", 1)],
    ids=["garbage", "short", "long", "of another head", "on another base"],
)
def test_patch_that_does_not_lead_to_the_signed_head_is_refused_and_the_head_gathered(patch: bytes) -> None:
    heads = heads_with_base()
    heads.gather(blob(HEAD.to_bytes())[0], offer(patch))
    assert give(heads, patch)[-1] == Progress(HEAD.sha256, False)
    with pytest.raises(ChunkError):
        heads.read(HEAD.sha256)
    need = heads.need(HEAD.sha256)
    assert need is not None
    assert need.sha256 == HEAD.sha256
    assert give(heads, HEAD.to_bytes())[-1] == Progress(HEAD.sha256, True)


def test_base_that_was_dropped_meanwhile_costs_the_whole_head() -> None:
    heads = heads_with_base()
    heads.gather(blob(HEAD.to_bytes())[0], offer())
    heads.drop(BASE.sha256)
    assert give(heads, PATCH)[-1] == Progress(HEAD.sha256, False)
    assert give(heads, HEAD.to_bytes())[-1] == Progress(HEAD.sha256, True)


def test_patch_larger_than_a_head_may_be_is_refused() -> None:
    heads = Heads(len(BASE.to_bytes()))
    heads.gather(blob(BASE.to_bytes())[0])
    give(heads, BASE.to_bytes())
    with pytest.raises(ChunkError, match="larger than allowed"):
        heads.gather(blob(HEAD.to_bytes())[0], offer(bytes(len(BASE.to_bytes()) + 1)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"patch": None}, True),
        ({"patch": None, "head_on_need": False}, False),
        ({"patch": offer(base=checkpoint(7))}, True),
        ({"head": blob(BASE.to_bytes())[0], "patch": None}, False),
    ],
    ids=["base is here", "no patch", "comes by itself", "base is not here", "head is here"],
)
def test_head_is_asked_for_where_nothing_leads_to_it(changes: dict[str, Any], expected: bool) -> None:
    assert heads_with_base().must_ask(invitation(**changes)) is expected


# --- the agent ---


def serve_needs(lab: Lab, blobs: list[bytes]) -> None:
    """Answers every bitmap that was not answered yet, as the cloud does."""
    for heard in lab.cloud.of(Need):
        assert isinstance(heard.body, Need)
        for data in blobs:
            ref, chunks = blob(data)
            if ref.sha256 == heard.body.sha256:
                for index, chunk in enumerate(chunks):
                    lab.cloud.transport.publish(
                        Packet(lab.cloud.topics.blob_chunk(ref.sha256.hex(), index), chunk)
                    )


def invite(
    lab: Lab, head: Checkpoint, number: int, patch: tuple[bytes, bytes] | None = None, *, lost: bool = False
) -> None:
    """Says only what a cloud says that sends heads on need."""
    ref, _ = blob(head.to_bytes())
    offered = None if patch is None else HeadPatch(base_sha256=patch[0], blob=blob(patch[1])[0])
    lab.cloud.invitation = Invitation(
        run="spring",
        round_number=number,
        open=True,
        deadline=lab.time.now() + 60.0,
        graphs_sha256=bytes.fromhex(lab.bundle.manifest.graphs_sha256),
        head=ref,
        train=TrainConfig(epochs=1, batch_size=8, learning_rate=0.05),
        head_on_need=True,
        patch=offered,
    )
    lab.cloud.say(lab.cloud.invitation, device="*", topic=lab.cloud.topics.invitation(None), retain=True)
    if patch is not None and not lost:
        ref, chunks = blob(patch[1])
        for index, chunk in enumerate(chunks):
            lab.cloud.transport.publish(Packet(lab.cloud.topics.blob_chunk(ref.sha256.hex(), index), chunk))
    lab.settle()


def taught(lab: Lab) -> Agent:
    agent = lab.agent()
    lab.run(2)
    feed(agent, lab.bundle, 50)
    return agent


def bases(lab: Lab) -> list[bytes]:
    return [heard.body.base_sha256 for heard in lab.cloud.of(Update) if isinstance(heard.body, Update)]


def step_from(old: Checkpoint) -> tuple[Checkpoint, bytes]:
    patch = make_patch(old, replace(old, params=old.params * np.float32(1.01)), "int8", 1)
    return apply_patch(old, patch), patch


def test_first_head_is_taken_from_the_installed_release_without_a_chunk(lab: Lab) -> None:
    taught(lab)
    first = lab.cloud.candidate().checkpoint
    invite(lab, first, 1)
    lab.cloud.order("dev-1")
    lab.run(3)
    assert bases(lab) == [first.sha256]
    assert lab.cloud.of(Need) == []


def test_rounds_go_on_by_patches_alone(lab: Lab) -> None:
    taught(lab)
    head = lab.cloud.candidate().checkpoint
    invite(lab, head, 1)
    lab.cloud.order("dev-1")
    lab.run(3)
    expected = [head.sha256]
    for number in (2, 3):
        new, patch = step_from(head)
        invite(lab, new, number, (head.sha256, patch))
        lab.cloud.order("dev-1")
        lab.run(3)
        head = new
        expected.append(head.sha256)
    assert bases(lab) == expected
    assert lab.cloud.of(Need) == []


def test_device_that_was_away_asks_for_the_whole_head_at_once(lab: Lab) -> None:
    taught(lab)
    missed, _ = step_from(lab.cloud.candidate().checkpoint)
    head, patch = step_from(missed)
    invite(lab, head, 5, (missed.sha256, patch))
    lab.cloud.order("dev-1")
    lab.run(0.6)
    (need,) = (heard.body for heard in lab.cloud.of(Need))
    assert isinstance(need, Need)
    assert need.sha256 == head.sha256
    serve_needs(lab, [head.to_bytes()])
    lab.run(3)
    assert bases(lab) == [head.sha256]


def test_lost_chunks_of_a_patch_are_asked_for_by_bitmap(lab: Lab) -> None:
    taught(lab)
    base = lab.cloud.candidate().checkpoint
    head, patch = step_from(base)
    invite(lab, head, 2, (base.sha256, patch), lost=True)
    lab.cloud.order("dev-1")
    lab.run(6)
    assert {heard.body.sha256 for heard in lab.cloud.of(Need) if isinstance(heard.body, Need)} == {
        blob(patch)[0].sha256
    }
    serve_needs(lab, [patch])
    lab.run(3)
    assert bases(lab) == [head.sha256]


def test_agent_never_trains_on_what_a_foreign_patch_leads_to(lab: Lab) -> None:
    taught(lab)
    base = lab.cloud.candidate().checkpoint
    head, _ = step_from(base)
    foreign = make_patch(base, replace(base, params=-base.params), "int8", 9)
    invite(lab, head, 2, (base.sha256, foreign))
    lab.cloud.order("dev-1")
    lab.run(6)
    serve_needs(lab, [head.to_bytes()])
    lab.run(6)
    assert bases(lab) == [head.sha256]


def test_closed_invitation_keeps_the_head_that_it_names_as_a_base(lab: Lab) -> None:
    agent = taught(lab)
    base = lab.cloud.candidate().checkpoint
    head, patch = step_from(base)
    invite(lab, head, 2, (base.sha256, patch))
    closed = replace_open(lab.cloud.invitation)
    lab.cloud.say(closed, device="*", topic=lab.cloud.topics.invitation(None), retain=True)
    lab.settle()
    assert agent.parts.heads.read(head.sha256) == head.to_bytes()


def replace_open(invited: Invitation) -> Invitation:
    return Invitation(
        run=invited.run,
        round_number=invited.round_number,
        open=False,
        deadline=0.0,
        graphs_sha256=invited.graphs_sha256,
        head=invited.head,
        train=invited.train,
    )


def test_release_checkpoint_that_is_damaged_is_no_head(lab: Lab) -> None:
    agent = taught(lab)
    contents = agent.parts.slots.current()
    assert contents is not None
    head = lab.cloud.candidate().checkpoint
    whole = Heads(LIMIT, lambda: contents)
    assert whole.gather(blob(head.to_bytes())[0])
    spoiled = replace(contents, reader=lambda name: b"\0" + contents.reader(name))
    heads = Heads(LIMIT, lambda: spoiled)
    assert not heads.gather(blob(head.to_bytes())[0])
    assert heads.need(head.sha256) is not None


def test_head_that_waits_is_taken_from_the_release_that_comes(lab: Lab) -> None:
    """A device that has just enrolled hears of the round before it has the release that the round begins with."""
    first = lab.cloud.candidate().checkpoint
    reachable = [False]
    agent = lab.agent(source=lambda path: lab.cloud.repository.read(path) if reachable[0] else None)
    feed(agent, lab.bundle, 50)
    invite(lab, first, 1)
    lab.cloud.order("dev-1")
    lab.run(5)
    reachable[0] = True
    lab.run(40)
    assert set(bases(lab)) == {first.sha256}
    assert lab.cloud.of(Need) == []


def test_release_that_was_a_head_brings_no_parameters(lab: Lab) -> None:
    asked: list[str] = []

    def source(path: str) -> bytes | None:
        asked.append(path.rsplit(".", 2)[-2].rsplit("/", 1)[-1] + "." + path.rsplit(".", 1)[-1])
        return lab.cloud.repository.read(path)

    agent = lab.agent(source=source)
    lab.run(2)
    feed(agent, lab.bundle, 50)
    candidate = lab.cloud.candidate(lab.bundle.checkpoint().params * np.float32(1.01))
    invite(lab, candidate.checkpoint, 2)
    lab.cloud.order("dev-1", "evaluate")
    lab.run(1)
    serve_needs(lab, [candidate.checkpoint.to_bytes()])
    lab.run(3)
    assert "checkpoint.bin" in asked
    asked.clear()
    lab.cloud.release(candidate, 2)
    lab.run(5)
    assert agent.state.release_version == 2
    assert "release.json" in asked
    # What was a head is here, and so is what the release before had too.
    assert not {"checkpoint.bin", "golden_inputs.bin", "manifest.json"} & set(asked)

"""The default rule: about the mean where all are honest, who speaks in chorus or does not answer is not heard, nobody
moves it far alone, and what it knows of devices survives a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloud_server.aggregate.answers import ENOUGH, MOST, SILENT, Trace, answered
from cloud_server.aggregate.clipped_mean import LENGTH_ROOM, MOST_AGAIN, Shares, shares_of
from cloud_server.aggregate.clipped_mean import Rows as Sides
from cloud_server.aggregate.coordinate import heard_trimmed_mean, trimmed_mean
from cloud_server.aggregate.sketch import SKETCH_SIZE, Sketcher, unit_rows
from cloud_server.aggregate.standings import ACCORD, KEPT, accord
from cloud_server.aggregate.voices import MOST_PEERS, drawn_peers, kindred_voices, shared_voices
from cloud_server.flower import robust
from cloud_server.flower.robust import ClippedMean
from cloud_server.flower.state import export_state, import_state
from wire.errors import RoundError

SIZE = 200
Rows = NDArray[np.float64]


def honest(count: int, *, spread: float = 1.0, seed: int = 1) -> Rows:
    """Updates that share a direction and differ as devices with different data do."""
    rng = np.random.default_rng(seed)
    return np.ones(SIZE) / np.sqrt(SIZE) + spread * rng.normal(0, 1 / np.sqrt(SIZE), (count, SIZE))


def weigh(
    rows: Rows,
    *,
    weights: Sequence[int] | None = None,
    way: Rows | None = None,
    standings: Sequence[float] | None = None,
    headings: Sequence[float | None] | None = None,
    reference: Rows | None = None,
) -> Shares:
    return shares_of(
        [torch.from_numpy(np.array(row)) for row in rows],
        [float(np.linalg.norm(row)) for row in rows],
        list(weights or [10] * len(rows)),
        way=None if way is None else torch.from_numpy(way),
        standings=list(standings or [0.0] * len(rows)),
        headings=headings,
        seed=1,
        reference=None if reference is None else torch.from_numpy(reference),
    )


def step_of(rows: Rows, *, share: float = 0.3, seed: int = 0, **given_: Any) -> Rows:
    side_by_side = Sides(weigh(rows, **given_), SIZE, seed)
    for number, row in enumerate(rows):
        side_by_side.add(number, row.astype(np.float32))
    return side_by_side.step(share)


def test_honest_updates_give_about_their_mean() -> None:
    rows = honest(20)
    step, mean = step_of(rows), rows.mean(axis=0)
    assert step @ mean / (np.linalg.norm(step) * np.linalg.norm(mean)) > 0.99
    assert 0.95 < np.linalg.norm(step) / np.linalg.norm(mean) < 1.05


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_updates_of_one_length_give_their_mean(count: int) -> None:
    rows = unit_rows([torch.from_numpy(row) for row in honest(count)]).numpy()
    np.testing.assert_allclose(step_of(rows), rows.mean(axis=0), atol=1e-7)


def test_updates_that_are_all_the_same_give_that_update() -> None:
    rows = np.repeat(honest(1), 9, axis=0)
    np.testing.assert_allclose(step_of(rows), rows[0], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12))
def test_order_of_the_replies_changes_nothing(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows, standings = honest(count, seed=seed), rng.normal(0, 1, count)
    way, places = rng.normal(0, 1, SIZE), rng.permutation(count)
    first = step_of(rows, way=way, standings=standings.tolist())
    again = step_of(rows[places], way=way, standings=standings[places].tolist())
    np.testing.assert_allclose(first, again, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), boost=st.floats(0.0, 1e30))
def test_one_attacker_moves_the_step_no_further_than_its_share_of_the_room(seed: int, boost: float) -> None:
    """Of eleven of like weight nobody is more than a voice in those that are heard, and each is at most so long."""
    rows = honest(11, seed=7)
    rows[-1] = boost * np.random.default_rng(seed).normal(0, 1, SIZE)
    lengths = np.linalg.norm(rows, axis=1)
    step = step_of(rows)
    assert np.isfinite(step).all()
    assert np.linalg.norm(step) <= MOST_AGAIN * LENGTH_ROOM * np.median(lengths[lengths > 0])
    assert np.linalg.norm(step - step_of(rows[:-1])) < 0.5 * np.median(lengths)


def test_what_few_say_in_a_parameter_is_cut_away() -> None:
    rows = honest(10, spread=0.3)
    rows[:2, 0] += 0.5
    step = step_of(rows)
    assert step[0] < 0.5 * rows[:, 0].mean()
    assert step_of(rows, share=0.0)[0] > 0.8 * rows[:, 0].mean()


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_trimming_by_voices_of_one_size_is_the_trimmed_mean(weights: list[int] | None) -> None:
    """Whole weights are rows that are there so many times."""
    rows = torch.from_numpy(honest(9).astype(np.float32))
    counts = torch.tensor(weights or [1] * 9)
    expected = trimmed_mean(rows.repeat_interleave(counts, dim=0), 0.2 if weights else 1 / 9)
    found = heard_trimmed_mean(rows, counts.double(), 0.2 if weights else 1 / 9)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)


def test_more_than_sixty_four_replies_are_buckets_by_the_seed() -> None:
    rows = honest(70)
    first, again, other = (step_of(rows, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    mean = rows.mean(axis=0)
    assert first @ mean / (np.linalg.norm(first) * np.linalg.norm(mean)) > 0.95


def test_attackers_that_say_the_same_share_one_voice() -> None:
    rows = np.concatenate([honest(12), np.repeat(honest(1, seed=9), 6, axis=0)])
    voices = weigh(rows).voices
    assert sum(voices[12:]) < 1.5 * max(voices[:12])


def test_honest_devices_that_agree_keep_their_voices_beside_one_that_does_not() -> None:
    rows = np.concatenate([honest(10, spread=0.1), honest(1, spread=3.0, seed=5)])
    voices = shared_voices(torch.from_numpy(np.corrcoef(rows)), torch.arange(11))
    assert float(voices[:10].sum()) > 5.0


def test_update_against_all_others_is_not_heard_in_the_first_round() -> None:
    rows = honest(10, spread=0.5)
    rows[7:] *= -1.0
    assert weigh(rows).voices[7:] == [0.0, 0.0, 0.0]


def test_device_that_once_did_not_answer_is_heard_again_when_it_does() -> None:
    rows, way = honest(9), np.ones(SIZE)
    standings, heard = [0.0] * 8 + [-2.0], []
    for _ in range(5):
        shares = weigh(rows, way=way, standings=standings, headings=[0.9] * 9)
        standings = shares.standings
        heard.append(shares.voices[8] > 0.0)
    assert heard[0] is False
    assert heard[-1] is True
    assert max(standings) <= 0.0


def test_standing_is_the_decayed_sum_of_what_answers_lack() -> None:
    standings = torch.tensor([0.0, -0.5, -2.0, 0.0, -1.0]).double()
    answers = torch.tensor([0.2, 0.2, -3.0, 0.05, torch.nan]).double()
    found = answered(standings, answers, torch.tensor([1.0, 1.0, 0.0, 0.1, 1.0]).double())
    expected = [0.0, -0.5 * KEPT + 1.0 - ENOUGH, -2.0 * KEPT - MOST - ENOUGH, 0.25 - ENOUGH, -1.0]
    np.testing.assert_allclose(found, np.minimum(expected, 0.0), atol=1e-12)


def test_standings_rest_where_nobody_answers() -> None:
    standings, voices = torch.tensor([-0.5, 0.0, -1.5]).double(), torch.ones(3).double()
    for answers in ([-0.1, -0.2, 0.3], [torch.nan] * 3):
        assert torch.equal(answered(standings, torch.tensor(answers).double(), voices), standings)


def test_who_was_not_there_is_heard_as_far_as_it_goes_along() -> None:
    rows = honest(10, spread=0.5)
    rows[8] *= -1.0
    shares = weigh(rows, way=np.ones(SIZE), headings=[1.0] * 8 + [None, None])
    assert shares.voices[8] == 0.0
    assert shares.voices[9] > 0.05


def test_own_part_in_a_step_answers_for_nobody() -> None:
    row = np.eye(1, 4, dtype=np.float32)[0]
    kept = Trace(heading=0.5, own=0.4, row=row)
    assert kept.of_the_others(row) == 0.5
    assert kept.of_the_others(np.roll(row, 1)) == pytest.approx(0.1)
    assert kept.of_the_others(np.empty(0, np.float32)) == 0.5


def test_own_part_is_what_the_step_owes_to_an_update() -> None:
    rows, shares = honest(5), weigh(honest(5))
    lengths = np.linalg.norm(rows, axis=1)
    parts = np.array(shares.voices) * np.array(shares.cuts)
    step = parts @ rows
    np.testing.assert_allclose(shares.own, parts * lengths / np.linalg.norm(step), atol=1e-9)
    np.testing.assert_allclose(shares.headings, rows @ step / lengths / np.linalg.norm(step), atol=1e-9)


@pytest.mark.parametrize("boost", [1.0, 100.0])
def test_liars_are_found_out_where_the_fleet_has_arrived(boost: float) -> None:
    """Sixteen devices pull to optima of their own around the head, so that a way tells nothing; four send the opposite
    of what they learn."""
    rng = np.random.default_rng(6)
    optima, curves = rng.normal(0, 1, (20, SIZE)), rng.uniform(0.0, 0.6, (20, SIZE))
    optima -= (curves * optima).sum(axis=0) / curves.sum(axis=0)
    strategy, head = ClippedMean(), np.zeros(SIZE)
    for number in range(8):
        rows = (curves * (optima - head) + rng.normal(0, 0.02, (20, SIZE))).astype(np.float32)
        rows[16:] *= -boost
        sent = [(node, 10, row) for node, row in enumerate(rows)]
        step, _ = strategy.fold(lambda sent=sent: sent, size=SIZE, seed=number)  # type: ignore[misc]
        strategy.way, head = step, head + step
    standings = [strategy.standings.get(node, 0.0) for node in range(20)]
    assert max(standings[16:]) < SILENT
    assert min(standings[:16]) > 0.5 * SILENT


def test_cohort_that_turns_around_is_heard() -> None:
    """Where most point away from the old way, the old way is no measure."""
    rows = -honest(9, spread=0.2)
    assert all(factor > 0.0 for factor in weigh(rows, way=np.ones(SIZE)).voices)


def test_devices_that_send_nothing_neither_stop_nor_hold_up() -> None:
    rows = honest(9)
    rows[:3] = 0.0
    np.testing.assert_allclose(step_of(rows), step_of(rows[3:]), atol=1e-8)
    assert not step_of(np.zeros((4, SIZE))).any()


def unlike(count: int, *, seed: int = 1) -> NDArray[np.float64]:
    """Cosines of devices that hold different data: about 0 on the mean, some above and some below."""
    drawn = np.random.default_rng(seed).normal(0.0, 0.12, (count, count))
    cosines = np.clip((drawn + drawn.T) / 2**0.5, -0.3, 0.3)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def test_likeness_is_measured_by_the_spread_of_all_pairs() -> None:
    cosines = unlike(16)
    cosines[:3, :3] = np.where(np.eye(3) == 1.0, 1.0, 0.6)
    cosines[4, 5] = cosines[5, 4] = 0.25
    voices = shared_voices(torch.from_numpy(cosines), torch.arange(16))
    assert float(voices[:3].sum()) < 0.5
    assert float(voices[4:6].min()) > 0.8
    assert float(voices[6:].min()) > 0.5


def test_noise_has_no_kin_and_no_voice() -> None:
    cosines = unlike(16)
    cosines[:4, :] = cosines[:, :4] = 0.005
    np.fill_diagonal(cosines, 1.0)
    kindred = kindred_voices(torch.from_numpy(cosines), torch.arange(16))
    assert kindred[:4].tolist() == [0.0] * 4
    assert kindred[4:].tolist() == [1.0] * 12


def test_large_cohort_is_judged_by_peers_as_by_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty of two hundred say the same, ten are noise; each is compared with a hundred."""
    rng = np.random.default_rng(3)
    rows = honest(170, spread=1.0)
    rows = np.concatenate([rows, np.repeat(honest(1, seed=9), 20, axis=0), 0.3 * rng.normal(size=(10, SIZE))])
    whole = np.array(weigh(rows).voices)
    monkeypatch.setattr("cloud_server.aggregate.voices.MOST_PEERS", 100)
    drawn = np.array(weigh(rows).voices)
    for voices in (whole, drawn):
        assert voices[170:190].sum() < 2.0 * voices[:170].max()
    assert np.corrcoef(whole, drawn)[0, 1] > 0.95


def test_peers_are_all_of_a_small_cohort_and_drawn_by_seed_of_a_large_one() -> None:
    assert drawn_peers(MOST_PEERS, 1).tolist() == list(range(MOST_PEERS))
    first, again, other = (drawn_peers(3 * MOST_PEERS, seed).tolist() for seed in (1, 1, 2))
    assert first == again == sorted(set(first))
    assert len(first) == MOST_PEERS
    assert first != other


def test_accord_is_that_of_the_median_voice() -> None:
    cosines = torch.tensor([-0.5, 0.5 * ACCORD, 0.9, -0.4], dtype=torch.float64)
    assert accord(cosines, torch.tensor([0.0, 1.0, 1.0, 0.0]).double()) == pytest.approx(0.5)
    assert accord(cosines, torch.ones(4).double()) == 0.0
    assert accord(cosines, torch.tensor([0.0, 0.0, 1.0, 0.0]).double()) == 1.0


def test_newcomers_are_heard_where_nobody_agrees_where_to_go() -> None:
    """Of a fleet that has nearly arrived most may pull against the way: that is no sign of bad faith, nor of good."""
    rows = honest(9)
    rows[3:] *= -1.0
    assert min(weigh(rows, way=np.ones(SIZE)).voices) > 0.05


# ---- with a root of trust ----------------------------------------------------------------------------------


def test_most_of_the_fleet_may_lie_where_samples_are_trusted() -> None:
    rows = honest(10, spread=0.5)
    rows[3:] *= -1.0
    shares = weigh(rows, reference=np.ones(SIZE))
    assert shares.voices[3:] == [0.0] * 7
    assert min(shares.voices[:3]) > 0.0


def test_head_that_liars_took_along_comes_back_where_samples_are_trusted() -> None:
    """They were heard once and the way is theirs: who goes along with it must not be heard for that."""
    rows = honest(10, spread=0.5)
    rows[6:] *= -1.0
    standings = [-0.5] * 6 + [0.5] * 4
    for _ in range(3):
        standings = weigh(rows, way=-np.ones(SIZE), standings=standings, reference=np.ones(SIZE)).standings
    shares = weigh(rows, way=-np.ones(SIZE), standings=standings, reference=np.ones(SIZE))
    assert shares.voices[6:] == [0.0] * 4
    assert min(shares.voices[:6]) > 0.0


@pytest.mark.parametrize("rows", [-honest(3, spread=0.1), np.zeros((3, SIZE))], ids=["against", "no update"])
def test_nobody_to_trust_is_a_failed_round(rows: Rows) -> None:
    with pytest.raises(RoundError, match="operator's samples"):
        weigh(rows, reference=np.ones(SIZE))


# ---- sketches ----------------------------------------------------------------------------------------------


def test_sketch_of_a_short_vector_is_the_vector() -> None:
    vector = np.arange(10, dtype=np.float32)
    np.testing.assert_array_equal(Sketcher(10, 1).sketch(vector).numpy(), vector)


def test_sketches_keep_angles() -> None:
    rng = np.random.default_rng(4)
    size = 6 * SKETCH_SIZE + 17
    base = rng.normal(0, 1, size)
    rows = [
        (share * base + rng.normal(0, 1, size)).astype(np.float32) for share in (0.0, 0.5, 1.0, -1.0, 3.0)
    ]
    sketcher = Sketcher(size, 5)
    units = unit_rows([sketcher.sketch(row) for row in rows])
    assert units.shape == (5, SKETCH_SIZE)
    np.testing.assert_allclose((units @ units.T).numpy(), np.corrcoef(rows), atol=0.05)


def test_signs_of_a_sketch_follow_from_the_seed() -> None:
    vector = np.random.default_rng(1).normal(0, 1, SKETCH_SIZE + 5).astype(np.float32)
    first, again, other = (Sketcher(len(vector), seed).sketch(vector) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- what is kept ------------------------------------------------------------------------------------------


def fold_round(strategy: ClippedMean, number: int) -> Rows:
    """Of six, whose common direction fades from round to round; the first does not follow."""
    rows = honest(6, seed=number).astype(np.float32)
    rows[1:] -= np.float32(0.3 * number / SIZE**0.5)
    step, _ = strategy.fold(
        lambda: ((2**63 + node, 10, row) for node, row in enumerate(rows)), size=SIZE, seed=number
    )
    strategy.way = step
    return step


def test_one_reply_that_was_made_of_many_leaves_their_traces() -> None:
    strategy = ClippedMean()
    step = fold_round(strategy, 1)
    kept = dict(strategy.traces)
    strategy.fold(lambda: [(1, 60, step.astype(np.float32))], size=SIZE, seed=1)
    assert strategy.traces == kept


def test_large_cohort_keeps_no_rows_and_is_judged_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "MOST_PEERS", 4)
    strategy = ClippedMean()
    fold_round(strategy, 1)
    assert [each.row.size for each in strategy.traces.values()] == [0] * 6
    fold_round(strategy, 2)
    assert min(strategy.standings.values()) < 0.0


def test_state_that_goes_out_and_in_changes_nothing() -> None:
    through, restarted = ClippedMean(), ClippedMean()
    for number in range(1, 4):
        fresh = ClippedMean()
        import_state(fresh, export_state(restarted))
        restarted = fresh
        np.testing.assert_array_equal(fold_round(through, number), fold_round(restarted, number))
    assert set(through.traces) == {2**63 + node for node in range(6)}
    assert through.standings == restarted.standings
    assert min(through.standings.values()) < 0.0
    import_state(restarted, {})
    assert (restarted.way, restarted.standings, restarted.traces) == (None, {}, {})


def test_standings_of_devices_long_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "MOST_STANDINGS", 4)
    strategy = ClippedMean()
    strategy.standings = {2**63 + node: -0.5 for node in range(6)}
    fold_round(strategy, 1)
    assert list(strategy.standings) == [2**63 + node for node in range(2, 6)]

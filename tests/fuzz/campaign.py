"""One run of the fuzzer: so many hostile envelopes and so many inputs for every other decoder, all by one seed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.fuzz.corpus import stored
from tests.fuzz.decoders import DECODERS, Decoder, LawError
from tests.fuzz.envelopes import Generator, Hostile, opened
from wire.errors import EnvelopeError, ShoalError

MAX_FINDINGS = 20


@dataclass
class Result:
    """What one run did and found.

    Attributes:
        signed: how many inputs had a valid signature of an enrolled key.
        refused: refusals by reason (envelopes) or by decoder.
        findings: what must not happen, with the bytes that make it happen.
        first_at: after how many inputs the first finding came, 0 without one.
    """

    count: int = 0
    signed: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    first_at: int = 0

    def note(self, where: str, what: str, data: bytes) -> None:
        self.first_at = self.first_at or self.count
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append({"where": where, "what": what, "input": data.hex()})

    def add(self, other: Result) -> None:
        """Takes another part of the same run in."""
        self.first_at = self.first_at or (self.count + other.first_at if other.first_at else 0)
        self.count, self.signed = self.count + other.count, self.signed + other.signed
        self.seconds += other.seconds
        self.refused += other.refused
        self.findings += other.findings[: MAX_FINDINGS - len(self.findings)]


def attack_envelopes(seed: int, count: int, *, stops_at_first: bool = False) -> Result:
    """Opens `count` hostile envelopes: each must be refused by an `EnvelopeError` and by nothing else."""
    result, generator, started = Result(), Generator(seed), time.perf_counter()
    for _ in range(count):
        hostile = generator.next()
        result.count += 1
        result.signed += hostile.is_signed
        what = _opening(hostile, result.refused)
        if what:
            result.note(hostile.kind, what, hostile.message)
            if stops_at_first:
                break
    result.seconds = time.perf_counter() - started
    return result


def _opening(hostile: Hostile, refused: Counter[str]) -> str:
    """What went wrong, or nothing."""
    try:
        opened(hostile)
    except EnvelopeError as error:
        refused[error.reason] += 1
        return ""
    except Exception as error:  # noqa: BLE001 - any other exception is what is looked for
        return f"{type(error).__name__}: {error}"
    return "accepted"


def attack_decoders(seed: int, count_each: int, *, stops_at_first: bool = False) -> Result:
    """Gives every decoder what is stored for it and `count_each` hostile inputs."""
    result, started = Result(), time.perf_counter()
    for decoder in DECODERS:
        random = Random(f"{seed} {decoder.name}")
        fresh = (decoder.hostile(random) for _ in range(count_each))
        for inputs in (decoder.seeds, stored(decoder.name), fresh):
            attack(decoder, inputs, result, stops_at_first=stops_at_first)
            if stops_at_first and result.findings:
                break
    result.seconds = time.perf_counter() - started
    return result


def attack(
    decoder: Decoder, inputs: Iterable[bytes], result: Result, *, stops_at_first: bool = False
) -> None:
    """Gives one decoder inputs, and adds what came of it to `result`."""
    for data in inputs:
        result.count += 1
        what = _decoding(decoder.decode, data)
        if what == "refused":
            result.refused[decoder.name] += 1
        elif what:
            result.note(decoder.name, what, data)
            if stops_at_first:
                return


def _decoding(decode: Callable[[bytes], None], data: bytes) -> str:
    """`refused`, what went wrong, or nothing."""
    try:
        decode(data)
    except ShoalError:
        return "refused"
    except LawError as error:
        return f"let through against the law: {error}"
    except Exception as error:  # noqa: BLE001 - any other exception is what is looked for
        return f"{type(error).__name__}: {error}"
    return ""

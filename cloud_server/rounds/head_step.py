"""From one head to the next in few bytes: the step is coded, and what the code left out is added to the next step.

Laws of the file: pure; the head *is* base + decoded difference, so that a device which holds the base makes the same
bytes; its ranges are measured on those parameters, not on the ones that were wanted; a patch that is not smaller than
the head is none. Source: docs/protocol.md, clause 12; error feedback (Karimireddy et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cloud_server.rounds.ports import Vector
from process.logs import get_logger
from wire.checkpoint import Checkpoint
from wire.errors import UpdateError
from wire.patch import code_difference, pack_patch

_log = get_logger("cloud.rounds")


@dataclass(frozen=True, slots=True, eq=False)
class StepTaken:
    """A new head.

    Attributes:
        base_sha256: of the checkpoint that `patch` is made on; empty without a patch.
        patch: empty: who wants the head needs all of it.
        residual: float32 [P], what the next step owes; None for nothing.
    """

    head: Checkpoint
    base_sha256: bytes = b""
    patch: bytes = b""
    residual: Vector | None = None


def take_step(
    base: Checkpoint,
    params: Vector,
    residual: Vector | None,
    finish: Callable[[Vector], Checkpoint],
    *,
    codec: str,
    seed: int,
) -> StepTaken:
    """Moves the head from `base` to `params`, as near as the code comes.

    Args:
        params: float32 [P].
        residual: what the step before left out.
        finish: makes a head of parameters.
        codec: of the patch; empty for none.
    """
    wanted = params if residual is None else params + residual
    if codec:
        try:
            difference = code_difference(base.params, wanted, codec, seed)
        except UpdateError as error:
            _log.warning("head_not_coded", codec=codec, reason=str(error))
        else:
            head = finish(difference.params)
            patch = pack_patch(base.sha256, difference, head)
            if len(patch) < len(head.to_bytes()):
                return StepTaken(head, base.sha256, patch, wanted - head.params)
    return StepTaken(finish(wanted))

"""FLTrust: every update weighs as much as it points where the operator's own clean samples point.

Source: Cao et al., "FLTrust: Byzantine-robust federated learning via trust bootstrapping", arXiv:2012.13995.
It withstands any share of attackers as long as the operator's samples resemble the fleet's.
"""

from __future__ import annotations

import torch

from cloud_server.aggregate.gram import weighted_mean
from wire.errors import RoundError


def fltrust(matrix: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The trusted mean, as float32 [P].

    Each row is scaled to the reference's length and weighs max(0, its cosine with the reference).

    Args:
        matrix: float32 [K, P].
        reference: float32 [P], the update that the operator's samples make from the same base.

    Raises:
        RoundError: the reference is zero, or no update points where it does.
    """
    length = float(torch.linalg.vector_norm(reference, dtype=torch.float64))
    if length == 0.0:
        raise RoundError("the operator's samples moved nothing: there is nothing to trust")
    lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
    # The shares of a weighted mean, so that rows are never scaled one by one: w = trust · ‖ref‖ / ‖row‖.
    products = torch.mv(matrix.double(), reference.double())
    trust = (products / (lengths * length).clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0.0)
    trust = torch.where(lengths > 0.0, trust, torch.zeros_like(trust))
    total = float(trust.sum())
    if total == 0.0:
        raise RoundError("no update points where the operator's samples do")
    weights = torch.where(trust > 0.0, trust * length / lengths, torch.zeros_like(trust))
    return weighted_mean(matrix, weights) * float(weights.sum() / total)

"""The model: whether there is one to train and one to serve, and what became of the run."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "model"


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Warns without a model, without a release, and when the run stands still."""
    if not facts.models:
        return Finding(NAME, "warn", "no model is imported", "shoal-cloud model import FOLDER")
    if not facts.release_version:
        return Finding(NAME, "warn", "no release yet", "the service publishes the first one when it starts")
    detail = f"release {facts.release_version}; run {facts.run or 'none'} {facts.run_status}".rstrip()
    if facts.run_status == "exhausted":
        return Finding(NAME, "warn", detail, "the privacy budget is spent: shoal-cloud privacy show")
    if facts.run_status == "paused":
        return Finding(NAME, "warn", detail, "shoal-cloud round resume")
    return Finding(NAME, "ok", detail)

"""What runs on a device: answers with the current model, learns from what it sees, sends sealed updates.

`Agent` is the public class. It is imported on first use: a command such as `shoal-edge status` must not pay
for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.agent import Agent
    from edge_agent.inference.serving import Answer

__all__ = ["Agent", "Answer"]


def __getattr__(name: str) -> Any:
    if name == "Agent":
        from edge_agent.agent import Agent

        return Agent
    if name == "Answer":
        from edge_agent.inference.serving import Answer

        return Answer
    raise AttributeError(name)

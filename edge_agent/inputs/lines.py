"""Lines of JSON from a stream, usually standard input: one item a line, one answer a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

from edge_agent.inputs.item import MAX_LINE_BYTES, Answering, Answers, answer_error, answer_item, read_item
from wire.errors import DataError, ShoalError


class LineInput:
    """Reads a stream to its end.

    Args:
        stream: binary; read line by line, never further than the longest allowed line.
        answers: takes each answer, in the order of the lines.
    """

    def __init__(self, stream: IO[bytes], answers: Answers) -> None:
        self._stream = stream
        self._answers = answers

    def run(self, agent: Answering, should_stop: Callable[[], bool]) -> None:
        """Answers until the stream ends or `should_stop`."""
        number = 0
        while not should_stop():
            line = self._stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number += 1
            if line.strip():
                self._answer(agent, line, f"line {number}")

    def _answer(self, agent: Answering, line: bytes, where: str) -> None:
        name = where
        try:
            if len(line) > MAX_LINE_BYTES:
                self._skip_rest_of_line()
                raise DataError("a line is too long", limit_bytes=MAX_LINE_BYTES)
            item = read_item(line)
            name = item.id or where
            self._answers(answer_item(agent, item))
        except ShoalError as error:
            self._answers(answer_error(error, name))

    def _skip_rest_of_line(self) -> None:
        while (rest := self._stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            continue

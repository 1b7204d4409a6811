"""Logs: one event a line, no secrets, foreign records in the same form."""

from __future__ import annotations

import io
import json
import logging

import pytest

from process.logs import configure_logs, get_logger
from process.progress import Progress
from wire.errors import ConfigurationError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read_json(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_event_and_fields_come_out_as_logfmt() -> None:
    stream = io.StringIO()
    configure_logs(stream=stream)
    get_logger("cloud.rounds").info(
        "round_started", round=3, cohort=16, share=0.5, first=True, why=None, on="a b"
    )
    line = stream.getvalue()
    assert line.startswith("time=20")
    assert line.endswith(
        'level=info logger=cloud.rounds event=round_started round=3 cohort=16 share=0.5 first=true why= on="a b"\n'
    )


def test_event_and_fields_come_out_as_json() -> None:
    stream = io.StringIO()
    configure_logs("json", stream=stream)
    get_logger("x").warning("refused", device="dev-1", size_bytes=12, share=float("nan"), event="again")
    (line,) = read_json(stream)
    assert (line["level"], line["event"], line["event_"]) == ("warning", "refused", "again")
    assert (line["device"], line["size_bytes"], line["share"]) == ("dev-1", 12, "nan")


def test_payloads_and_secrets_never_come_out() -> None:
    stream = io.StringIO()
    configure_logs(stream=stream)
    get_logger("x").error("bad", body=b"raw sample", enrol_token="abc", Private_key="def", long="y" * 1_000)
    assert "raw sample" not in stream.getvalue()
    assert "abc" not in stream.getvalue()
    assert "def" not in stream.getvalue()
    assert '"<10 bytes>"' in stream.getvalue() or "<10 bytes>" in stream.getvalue()
    assert len(stream.getvalue()) < 600


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_field_of_a_peer_cannot_start_a_line_or_paint_the_terminal(form: str) -> None:
    stream = io.StringIO()
    configure_logs(form, stream=stream)  # type: ignore[arg-type]
    get_logger("x").info("odd", device='x\nlevel=error event=forged "quoted" \x1b[31m\u2028')
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()
    assert "\u2028" not in stream.getvalue()


def test_exception_is_one_line_with_its_trace() -> None:
    stream = io.StringIO()
    configure_logs("json", stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        get_logger("x").exception("job_failed", job="train")
    (line,) = read_json(stream)
    assert line["error"] == "ValueError: broken"
    assert "Traceback" in str(line["trace"])
    assert line["job"] == "train"


def test_level_filters_and_records_of_other_libraries_have_the_same_form() -> None:
    stream = io.StringIO()
    configure_logs("json", level="warning", stream=stream)
    get_logger("x").info("unseen")
    logging.getLogger("uvicorn").warning("slow request %s", 3)
    (line,) = read_json(stream)
    assert (line["logger"], line["event"]) == ("uvicorn", "slow request 3")


def test_configuring_again_replaces_the_stream() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logs(stream=first)
    configure_logs(stream=second)
    get_logger("x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("event=once") == 1


@pytest.mark.parametrize(("form", "level"), [("xml", "info"), ("json", "loud")])
def test_unknown_form_or_level_is_refused(form: str, level: str) -> None:
    with pytest.raises(ConfigurationError):
        configure_logs(form, level)  # type: ignore[arg-type]


def test_line_is_written_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    configure_logs(stream=stream)
    with Progress("rounds", 2, stream=stream) as bar:
        get_logger("x").info("released")
        bar.advance()
    before, after = stream.getvalue().split("event=released\n")
    assert before.rpartition("\r\x1b[2K")[2].startswith("time=")
    assert after.startswith("\r\x1b[2Krounds")

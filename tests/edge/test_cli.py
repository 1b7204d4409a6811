"""`shoal-edge` as a person uses it: real processes, a real HTTPS server, a real broker; and every wrong command."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent import Agent
from edge_agent.cli import main
from edge_agent.vitals.status import read_status
from tests.edge.aggregator import Aggregator
from tests.transport.mailbox import Mailbox
from wire import envelope
from wire.messages import Birth, decode_body
from wire.primitives import VerifyKey
from wire.transport import Connected, Received
from wire.transport.mqtt import MqttTransport

DEADLINE_SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def enrolled(aggregator: Aggregator, tmp_path: Path) -> Path:
    assert main(["enroll", *with_token(tmp_path, aggregator), "--state", str(tmp_path / "state")]) == 0
    return tmp_path / "state"


def with_token(folder: Path, aggregator: Aggregator) -> list[str]:
    """What a command line says to name a file with a token in it."""
    place = folder / "token"
    place.write_text(aggregator.token() + "\n")
    return ["--token-file", str(place)]


def start(state: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edge_agent.cli", "run", "--state", str(state), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until, "the agent did not come that far"
        time.sleep(0.05)


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGTERM)
    output, talk = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, talk
    return output, talk


def item(**values: object) -> str:
    return json.dumps(values) + "\n"


WINDOW = np.linspace(-1, 1, 12).round(3).tolist()


def test_device_enrols_installs_its_model_answers_and_leaves(aggregator: Aggregator, tmp_path: Path) -> None:
    state, mailbox = tmp_path / "state", Mailbox()
    listener = MqttTransport("listener", aggregator.broker.host, aggregator.broker.port)
    listener.start(mailbox, filters=[("fl/1/acme/gates/st/+", 1)])
    mailbox.next(Connected)
    process = start(state, "--input", "-", SHOAL_ENROLL_TOKEN=aggregator.token())
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(item(window=WINDOW, id="a") + item(window=WINDOW, label=2) + "nonsense\n")
    process.stdin.write(item(id="a", label=1))
    process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert answers[0]["id"] == "a"
    assert answers[0]["release"] == 1
    assert sum(answers[0]["scores"]) == pytest.approx(1.0, abs=1e-4)
    assert "not JSON" in answers[2]["error"]
    assert answers[3] == {"id": "a", "accepted": True}
    wait_until(lambda: bool((read_status(state) or {}).get("connected")), process)
    talk = end(process)[1]
    assert "event=release_installed version=1" in talk
    assert aggregator.token() not in talk
    status = read_status(state)
    assert status is not None
    assert (status["status"], status["requests_total"], status["errors_total"]) == ("stopped", 2, 0)
    assert status["samples"]["labelled"] == 2
    births = [decode_body(body, Birth).status for body in signed_bodies(mailbox, aggregator)]
    assert births[0] == "online"
    assert births[-1] == "offline"
    listener.stop()


def test_first_run_with_a_token_of_another_aggregator_ends_with_its_code(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    token = aggregator.token(ca_sha256="ab" * 32)
    process = start(tmp_path / "state", SHOAL_ENROLL_TOKEN=token)
    output, talk = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, output) == (5, "")
    assert talk.count("error: ") == talk.count("hint: ") == 1
    assert "does not have the CA that the token pins" in talk
    assert token not in talk
    assert not (tmp_path / "state" / "identity").exists()


def test_first_run_loads_no_code_that_serving_does_not_need(aggregator: Aggregator, tmp_path: Path) -> None:
    code = "import sys; from edge_agent.cli import main; main(sys.argv[1:]);"
    heavy = {"cryptography.x509", "cryptography.hazmat.backends", "tuf", "securesystemslib", "stringprep"}
    code += f"print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--state", str(tmp_path / "state"), "--input", "-", "--once"],
        input=item(window=WINDOW),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SHOAL_ENROLL_TOKEN": aggregator.token()},
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    answer, loaded = done.stdout.splitlines()
    assert json.loads(answer)["release"] == 1
    assert loaded == "[]"
    assert "enrolled gate-1 in acme/gates" in done.stderr


def signed_bodies(mailbox: Mailbox, aggregator: Aggregator) -> Iterator[bytes]:
    """The births that were published, verified with the key that the device registered."""
    key = VerifyKey(bytes.fromhex(aggregator.requests[-1].update_key))
    signers = {key.key_id: envelope.Signer("gate-1", key)}
    expect = envelope.Expect("up", "acme", "gates", "st", "gate-1")
    mailbox.drain()
    for event in mailbox.seen:
        if isinstance(event, Received):
            opened = envelope.open_signed(
                event.packet.payload, signers=signers, expect=expect, now=time.time(), limit_bytes=65_536
            )
            yield opened.body


def test_second_start_serves_from_disk_and_needs_no_token(enrolled: Path, aggregator: Aggregator) -> None:
    process = start(enrolled, "--input", "-", "--once")
    output, talk = process.communicate(item(window=WINDOW), timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, talk
    first = json.loads(output)
    process = start(enrolled, "--input", "-", "--once", SHOAL_ENROLL_TOKEN="shoal1.whatever")
    output, talk = process.communicate(item(window=WINDOW), timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, talk
    assert json.loads(output)["scores"] == first["scores"]
    assert "event=release_installed" not in talk


def test_one_folder_has_one_agent_and_status_says_that_it_runs(
    enrolled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(enrolled)
    wait_until(lambda: bool((read_status(enrolled) or {}).get("release")), process)
    assert main(["run", "--state", str(enrolled)]) == 2
    assert "another agent runs" in capsys.readouterr().err
    assert main(["status", "--state", str(enrolled), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["status"], status["device"], status["release"]["version"]) == ("running", "gate-1", 1)
    assert main(["check", "--state", str(enrolled), "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {finding["level"] for finding in findings.values()} == {"ok"}
    process.kill()
    process.communicate()
    assert main(["status", "--state", str(enrolled)]) == 0
    assert "gone" in capsys.readouterr().out


def test_files_are_answered_once_with_their_names(enrolled: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.zeros((3, 12), np.float32))
    process = start(enrolled, "--input", str(tmp_path / "w.npy"), "--once")
    output, talk = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, talk
    assert [json.loads(line)["id"] for line in output.splitlines()] == ["w.npy#0", "w.npy#1", "w.npy#2"]


def test_windows_that_were_refused_are_in_the_exit_code_of_once(enrolled: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.zeros((2, 12), np.float32))
    np.save(tmp_path / "wrong.npy", np.zeros((2, 7), np.float32))
    process = start(enrolled, "--input", str(tmp_path), "--once")
    output, talk = process.communicate(timeout=DEADLINE_SECONDS)
    answers = [json.loads(line) for line in output.splitlines()]
    assert [answer["id"] for answer in answers if "error" not in answer] == ["good.npy#0", "good.npy#1"]
    assert process.returncode == 6
    assert "error: 1 of 3 could not be used" in talk


def test_agent_whose_answers_nobody_reads_ends(enrolled: Path, tmp_path: Path) -> None:
    with start(enrolled, "--input", "-") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(item(window=WINDOW))
        process.stdin.flush()
        assert process.wait(DEADLINE_SECONDS) == 141
        assert "Traceback" not in process.stderr.read()
    assert (read_status(enrolled) or {})["status"] == "stopped"


def test_interrupted_agent_stops_well_and_says_so(enrolled: Path) -> None:
    process = start(enrolled)
    wait_until(lambda: bool((read_status(enrolled) or {}).get("release")), process)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in talk
    assert (read_status(enrolled) or {})["status"] == "stopped"


def test_agent_tells_its_service_manager_that_it_is_up_lives_and_stops(
    enrolled: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_SECONDS)
        process = start(enrolled, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="4000000")
        assert manager.recv(4096) == b"READY=1"
        fed = manager.recv(4096).decode()
        assert fed.startswith("WATCHDOG=1\nSTATUS=release ")
        process.send_signal(signal.SIGTERM)
        while fed != "STOPPING=1":
            assert fed.startswith("WATCHDOG=1\nSTATUS=release ")
            fed = manager.recv(4096).decode()
        _, talk = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, talk


def test_agent_runs_inside_of_a_program(enrolled: Path) -> None:
    with Agent.from_folder(str(enrolled)) as agent:
        assert agent.wait_for_model(DEADLINE_SECONDS)
        assert agent.input_shape == (12,)
        answer = agent.infer(np.array(WINDOW, np.float32))
        assert agent.feedback(answer.sample_id, 1)
    status = read_status(enrolled)
    assert status is not None
    assert (status["status"], status["samples"]["labelled"]) == ("stopped", 1)


def test_check_finds_what_is_missing_and_says_what_to_do(
    enrolled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((enrolled / "identity" / "enrolment.json").read_text())
    facts["broker_url"] = "mqtt://127.0.0.1:1"
    (enrolled / "identity" / "enrolment.json").write_text(json.dumps(facts))
    assert main(["check", "--state", str(enrolled)]) == 1
    output = capsys.readouterr().out
    assert "fail  broker" in output
    assert "hint: is the broker running" in output
    assert "warn  model" in output
    assert "ok    aggregator" in output


def test_check_of_an_empty_folder_stops_at_the_identity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--state", str(tmp_path), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in findings] == ["disk", "identity"]
    assert "shoal-edge enroll" in findings[1]["hint"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["status"], 2, "not enrolled"),
        (["run"], 2, "not enrolled"),
        (["enroll"], 2, "no enrolment token"),
        (["enroll", "shoal1.abc"], 2, "can be read by everybody on this machine"),
        (["enroll", "-", "--token-file", "b"], 2, "given twice"),
        (["enroll", "--token-file", "/nowhere/token"], 2, "cannot read the enrolment token"),
        (["run", "--settings", "/nowhere.toml"], 2, "cannot read settings"),
        (["run", "--once"], 2, "there is none"),
        (["run", "--once", "--input", "mqtt://127.0.0.1/windows"], 2, "never ends"),
        (["run", "--input", "nowhere.npy"], 2, "there is no nowhere.npy"),
        (["run", "--input", "/dev/null"], 2, "neither a file nor a folder"),
    ],
)
def test_wrong_command_is_one_error_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main([*arguments, "--state", str(tmp_path / "state")]) == code
    talk = capsys.readouterr().err
    assert message in talk
    assert [line.partition(": ")[0] for line in talk.splitlines()] == ["error", "hint"]
    assert not (tmp_path / "state" / "identity").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "--inputs", "-"]])
def test_unknown_command_or_option_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainig]\nenabled = true\n", "did you mean 'training'"),
        ("[training]\nmax_steps = 0\n", "max_steps"),
        ("[inference]\nvariant = 'int4'\n", "variant"),
        ("not toml", "is not TOML"),
    ],
)
def test_wrong_settings_name_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "edge.toml").write_text(text)
    assert main(["run", "--state", str(tmp_path), "--settings", str(tmp_path / "edge.toml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("source", ["nowhere.npy", "ftp://x/y", "mqtt://host"])
def test_unknown_input_is_a_configuration_error_before_anything_starts(enrolled: Path, source: str) -> None:
    process = start(enrolled, "--input", source)
    output, talk = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 2
    assert output == ""
    assert talk.startswith("error: ")
    assert "hint: " in talk


def test_token_from_a_file_enrols(aggregator: Aggregator, tmp_path: Path) -> None:
    state = ["--state", str(tmp_path / "state")]
    assert main(["enroll", *with_token(tmp_path, aggregator), *state]) == 0
    assert main(["enroll", *with_token(tmp_path, aggregator), *state]) == 2


def test_token_from_standard_input_enrols(
    aggregator: Aggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{aggregator.token()}\n"))
    assert main(["enroll", "-", "--state", str(tmp_path / "state")]) == 0


@pytest.mark.parametrize("variable", ["SHOAL_ENROLL_TOKEN", "SHOAL_ENROLL_TOKEN_FILE"])
def test_token_from_the_environment_enrols_and_leaves_it(
    aggregator: Aggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    _, file = with_token(tmp_path, aggregator)
    monkeypatch.setenv(variable, file if variable.endswith("FILE") else aggregator.token())
    assert main(["enroll", "--state", str(tmp_path / "state")]) == 0
    assert variable not in os.environ


def test_token_on_the_command_line_is_refused_before_anything_is_sent(
    aggregator: Aggregator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = aggregator.token()
    before = len(aggregator.requests)
    assert main(["enroll", token, "--state", str(tmp_path / "state")]) == 2
    assert token not in capsys.readouterr().err
    assert len(aggregator.requests) == before
    assert not (tmp_path / "state").exists()


def test_text_that_is_no_token_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("nonsense\n"))
    assert main(["enroll", "-", "--state", str(tmp_path / "state")]) == 5
    assert "not an enrolment token" in capsys.readouterr().err


def modes(folder: Path) -> dict[str, int]:
    """What of a state folder group or others may touch."""
    found = [folder, *folder.rglob("*")]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777
        for path in found
        if path.stat().st_mode & 0o077
    }


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_state_is_its_owners_alone_whatever_the_umask(aggregator: Aggregator, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert main(["enroll", *with_token(tmp_path, aggregator), "--state", str(state)]) == 0
    (state / "agent.db").write_bytes(b"damaged, and open to others")
    np.save(tmp_path / "window.npy", np.asarray([WINDOW], np.float32))
    process = start(state, "--input", str(tmp_path / "window.npy"))
    wait_until(lambda: bool((read_status(state) or {}).get("release")), process)
    assert modes(state) == {}
    end(process)
    assert modes(state) == {}
    kept = {path.name for path in state.rglob("*")}
    assert kept >= {"agent.db", "ring", "status.json", "int8.onnx", "timestamp.json", "update.key"}
    assert list((state / "quarantine").glob("*agent.db.damaged"))


@pytest.mark.usefixtures("open_umask")
def test_program_of_a_careless_user_leaves_no_data_open_to_others(enrolled: Path) -> None:
    """Inside of somebody's program the umask is theirs; python-tuf's own folders lie in one of ours."""
    with Agent.from_folder(enrolled) as agent:
        assert agent.wait_for_model(DEADLINE_SECONDS)
        agent.observe(np.asarray(WINDOW, np.float32), 1)
        agent.parts.database.quarantine.keep("row", b"data", "damaged")
    inside = {name for name in modes(enrolled) if not name.startswith("tuf/metadata/")}
    assert inside == set()


def test_samples_are_forgotten_by_one_command(enrolled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Agent.from_folder(enrolled) as agent:
        assert agent.wait_for_model(DEADLINE_SECONDS)
        agent.observe(np.asarray(WINDOW, np.float32), 1)
        second = agent.observe(np.asarray(WINDOW, np.float32), 2)
        assert main(["forget", "samples", "--state", str(enrolled)]) == 2
        assert agent.parts.samples.counts()["samples"] == 2
        assert agent.forget(second)
        assert not agent.forget(second)
    assert main(["forget", "samples", "--state", str(enrolled)]) == 0
    assert "forgot 1 samples and 0 updates" in capsys.readouterr().err
    with Agent.from_folder(enrolled) as agent:
        assert agent.parts.samples.counts()["samples"] == 0
        assert agent.infer(np.asarray(WINDOW, np.float32)).release_version == 1
    assert main(["forget", "samples", "--state", str(enrolled.parent)]) == 2


def test_quarantine_is_listed_and_read_beside_a_running_agent(
    enrolled: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with Agent.from_folder(enrolled) as agent:
        agent.parts.database.quarantine.keep("outbox row", b"what lay there", "does not match its digest")
        assert main(["quarantine", "--json", "--state", str(enrolled)]) == 0
        (entry,) = json.loads(capfdbinary.readouterr().out)
        assert (entry["name"], entry["reason"]) == ("00000001-outbox_row", "does not match its digest")
        assert main(["quarantine", "--read", entry["name"], "--state", str(enrolled)]) == 0
        assert capfdbinary.readouterr().out == b"what lay there"
        assert main(["quarantine", "--read", "../identity/update.key", "--state", str(enrolled)]) == 8
        assert main(["quarantine", "--state", str(enrolled / "elsewhere")]) == 2
        assert capfdbinary.readouterr().out == b""


def test_folder_of_an_aggregator_is_not_made_a_devices(
    aggregator: Aggregator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "settings.toml").touch()
    named = with_token(tmp_path, aggregator)
    assert main(["enroll", *named, "--state", str(tmp_path)]) == 2
    assert "state folder of an aggregator" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "settings.toml", "token"]


def test_status_imports_nothing_heavy(enrolled: Path) -> None:
    code = f"import sys; from edge_agent.cli import main; main(['status', '--state', {str(enrolled)!r}]);"
    code += (
        "print(sorted({'onnxruntime', 'numpy', 'tuf', 'paho', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"

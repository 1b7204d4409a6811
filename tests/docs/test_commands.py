"""Every command in the documents works: fast, that it exists with the options it is given; slow, that it runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import cloud_server.cli
import edge_agent.cli
import fleet.cli
from tests.docs.documents import DOCUMENTS, ROOT, WITH_LINKS, Step, commands, steps

MAINS: dict[str, Callable[[list[str]], int]] = {
    "shoal-edge": edge_agent.cli.main,
    "shoal-cloud": cloud_server.cli.main,
    "shoal-fleet": fleet.cli.main,
}
# Ports that a reader uses; a test takes free ones in their place.
PORTS = ("8443", "8444", "1883", "8883")
LIMIT_SECONDS = 900
# What a reader does once, by himself, before anything else: here the tests' own environment takes its place.
SET_UP = re.compile(r"^(?:make \w[\w-]*|\. \.venv/bin/activate)\b.*$", re.MULTILINE)

INIT = re.compile(r"^shoal-cloud init\b[^#\n]*", re.MULTILINE)

PRELUDE = r"""
set -eEuo pipefail
trap 'echo "failed: $STEP: $BASH_COMMAND" >&2' ERR
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
STEP=start
wait_for() {
  for _ in $(seq 600); do
    if eval "$1" >/dev/null 2>&1; then return 0; fi
    sleep 0.5
  done
  echo "waited in vain: $1" >&2
  return 1
}
"""


def named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


# ---- every command exists ----------------------------------------------------------------------------------


def words_of(command: str) -> list[list[str]]:
    """The simple commands of a line, without what only the shell understands."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    is_target = False
    for word in lexer:
        if set(word) <= set("<>&") and set(word) & set("<>"):
            is_target = True
        elif is_target:
            is_target = False
        elif set(word) <= set("();|&"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [[word for word in part if not re.fullmatch(r"[A-Z_]+=.*", word)] for part in parts if part]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `--help` says of the deepest subcommand that the words name."""
    shown = ""
    path: list[str] = []
    for word in (None, *words[1:4]):
        if word is not None:
            if word.startswith("-") or f" {word} " not in f"{shown} ":
                break
            path.append(word)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            MAINS[words[0]]([*path, "--help"])
        assert ended.value.code == 0, f"{words[0]} {' '.join(path)} does not exist"
        shown = capsys.readouterr().out.replace("\n", " ")
    return shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_exist_with_the_options_they_are_given(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, command in commands(document):
        for words in words_of(command):
            if words and words[0] in MAINS:
                shown = help_of(words, capsys)
                for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                    assert f"{option} " in f"{shown} ".replace(",", " ").replace("]", " "), (
                        f"{named(document)}:{line}: {command!r} has no {option}"
                    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_make_targets_exist(document: Path) -> None:
    targets = set(
        re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for line, command in commands(document):
        for words in words_of(command):
            if words and words[0] == "make":
                assert words[1] in targets, f"{named(document)}:{line}: there is no target {words[1]}"


@pytest.mark.parametrize("document", WITH_LINKS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        place = (document.parent / file) if file else document
        assert place.exists(), f"{named(document)}: {target}"
        if heading:
            assert heading in anchors(place), f"{named(document)}: {target}"


def anchors(document: Path) -> set[str]:
    """What a heading is called in a link."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# ---- every command runs ------------------------------------------------------------------------------------


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def with_ports(init: re.Match[str]) -> str:
    """The default ports of an aggregator, said aloud, so that `script_of` can put free ones in their place."""
    broker = "" if "--settings" in init[0] else " --broker-port 1883"
    return f"{init[0].rstrip()} --public-port 8443 --device-port 8444{broker} --operators 127.0.0.1:0 "


def script_of(todo: list[Step], document: Path) -> str:
    """One shell script of all steps of a document."""
    lines = [PRELUDE]
    for step in todo:
        lines.append(f"STEP={shlex.quote(f'{named(document)}:{step.line}')}")
        if step.kind == "file":
            place = shlex.quote(step.value)
            lines += [
                f"mkdir -p $(dirname {place})",
                f"cat > {place} <<'END_OF_FILE'\n{step.text}END_OF_FILE",
            ]
        elif step.kind == "wait-for":
            lines.append(f"wait_for {shlex.quote(step.value)}")
        elif step.kind == "wait-for-port":
            lines.append(f"wait_for '(exec 3<>/dev/tcp/127.0.0.1/{step.value})'")
        else:
            lines.append(INIT.sub(with_ports, SET_UP.sub(":", step.text)))
    text = "\n".join(lines)
    for port, free in zip(PORTS, free_ports(len(PORTS)), strict=True):
        text = re.sub(rf"\b{port}\b", free, text)
    return text


def run_script(script: str, folder: Path) -> tuple[int, str]:
    """Exit code and all output; nothing that the script started outlives this."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (folder.parent / "output").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            with_group(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()


def with_group(process_group: int, number: int) -> None:
    try:
        os.killpg(process_group, number)
    except ProcessLookupError:
        return


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [each for each in DOCUMENTS if any(step.kind == "run" for step in steps(each))], ids=named
)
def test_commands_run(document: Path, tmp_path: Path) -> None:
    if "mosquitto" in document.name and not shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("needs mosquitto on PATH")
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "docs").symlink_to(ROOT / "docs")
    code, output = run_script(script_of(list(steps(document)), document), folder)
    assert code == 0, f"{named(document)} ended with {code}:\n{output[-6000:]}"


def test_strategies_of_the_documents_can_be_made() -> None:
    """`init` does not look at them: a run does, once a model is there."""
    from cloud_server.flower.strategies import build_strategy

    named_ones = 0
    for step in steps(ROOT / "docs" / "how-to" / "strategies.md"):
        if step.value.endswith(".toml"):
            run = tomllib.loads(step.text)["run"]
            build_strategy(run["strategy"], run.get("parameters", {}))
            named_ones += 1
    assert named_ones >= 2

"""The recipes of the images, as far as they can be judged without building one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, clean_environment

IMAGES = {
    "edge": {"wire", "process", "edge_agent"},
    "cloud": {"wire", "process", "models", "cloud_server"},
}
SCRIPT = ROOT / "deploy" / "build-images.sh"


def recipe(image: str) -> str:
    return (ROOT / f"Dockerfile.{image}").read_text(encoding="utf-8")


def copied(image: str) -> set[str]:
    """What comes from the build context."""
    words = [line.split()[1:-1] for line in recipe(image).splitlines() if line.startswith("COPY ")]
    return {word for line in words for word in line if not line[0].startswith("--from")}


@pytest.mark.parametrize("image", IMAGES)
def test_image_takes_its_own_packages_alone(image: str) -> None:
    folders = {name for name in copied(image) if (ROOT / name).is_dir()}
    assert folders == {*IMAGES[image], "deploy/locks"}


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_takes_exists_and_is_not_ignored(image: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*", "the context begins empty"
    for name in copied(image):
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


@pytest.mark.parametrize("image", IMAGES)
def test_image_runs_without_root_and_without_telemetry(image: str) -> None:
    final = recipe(image).rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*$", final, re.MULTILINE)
    assert "ORT_DISABLE_TELEMETRY=1" in final
    assert final.index("USER ") < final.index("ENTRYPOINT")
    assert re.findall(r"^VOLUME (\S+)$", final, re.MULTILINE) == re.findall(r"SHOAL_STATE=(\S+)", final)


def test_wheel_of_the_edge_image_holds_the_edge_alone(tmp_path: Path) -> None:
    """As the image builds it: from what it copies, and nothing else."""
    source = tmp_path / "source"
    source.mkdir()
    for name in copied("edge"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, env=clean_environment(), cwd=source)
    (wheel,) = tmp_path.glob("shoal-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in inside if not name.endswith(".dist-info")} == IMAGES["edge"]


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        ({}, [], "no image builder found"),
        ({"BUILDER": "kaniko"}, [], "BUILDER=kaniko is not known"),
        ({"BUILDER": "buildah"}, [], "buildah is not installed"),
    ],
    ids=["none", "unknown", "absent"],
)
def test_build_without_a_builder_says_what_to_do(
    tmp_path: Path, environment: dict[str, str], arguments: list[str], said: str
) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    ended = subprocess.run(
        [str(SCRIPT), *arguments], env={"PATH": str(tmp_path), **environment}, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert f"error: {said}" in ended.stderr
    assert "hint: " in ended.stderr


def test_build_of_an_unknown_image_builds_none(tmp_path: Path) -> None:
    """The builder here says what it was asked to do."""
    builder = tmp_path / "buildah"
    builder.write_text('#!/bin/sh\necho "$@"\n')
    builder.chmod(0o755)
    for tool in ("bash", "dirname", "env", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    environment = {"PATH": str(tmp_path), "BASE": "my-base", "BUILD_FLAGS": "--one --two"}
    refused = subprocess.run(
        [str(SCRIPT), "edge", "toaster"], env=environment, capture_output=True, text=True
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "there is no Dockerfile.toaster" in refused.stderr
    asked = subprocess.run([str(SCRIPT), "edge"], env=environment, capture_output=True, text=True)
    assert asked.returncode == 0
    assert asked.stdout.split() == [
        *("build", "--format", "docker", "--one", "--two", "--build-arg", "BASE=my-base"),
        *("--file", "Dockerfile.edge", "--tag", "shoal-edge:latest", "."),
    ]

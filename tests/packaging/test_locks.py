"""The locks of the images name every package that is needed, as it was tested, by hash; and no place to get it from."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.packaging.conftest import ROOT
from tests.packaging.test_sbom import made

IMAGES = {"edge": (), "cloud": ("cloud", "postgres")}
LOCKS = {"edge": ("edge",), "cloud": ("cloud", "torch")}
FILES = sorted((ROOT / "deploy" / "locks").glob("*.txt"))
ENTRY = re.compile(
    r"([A-Za-z0-9._-]+)==([^ ;]+)(?: ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
)


@cache
def locked(name: str) -> dict[str, str]:
    """Package to version."""
    text = (ROOT / "deploy" / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    return {canonicalize_name(found[1]): found[2] for found in ENTRY.finditer(text)}


def of_image(image: str) -> dict[str, str]:
    return {package: version for lock in LOCKS[image] for package, version in locked(lock).items()}


def needed(image: str) -> list[Requirement]:
    """What pyproject.toml asks for, the tool that builds included."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        plain = tomllib.load(file)
    texts = [*plain["project"]["dependencies"], *plain["build-system"]["requires"]]
    extras = plain["project"]["optional-dependencies"]
    return [
        Requirement(text) for text in (*texts, *(each for extra in IMAGES[image] for each in extras[extra]))
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_line_of_a_lock_is_a_package_with_its_hashes(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#"))
    assert ENTRY.sub("", text) == ""
    assert "://" not in text


@pytest.mark.parametrize("image", IMAGES)
def test_lock_satisfies_what_the_project_asks_for(image: str) -> None:
    versions = of_image(image)
    for requirement in needed(image):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(Version(version)), requirement


@pytest.mark.parametrize("image", IMAGES)
def test_lock_is_in_step_with_the_bill_of_materials(image: str) -> None:
    """What an installation of these extras pulls in here is locked, at the version that is here."""
    here = {each["name"]: Version(each["version"]).public for each in made(*IMAGES[image])["components"]}
    versions = of_image(image)
    assert {name: versions.get(name) for name in here} == here


@pytest.mark.parametrize("lock", ["edge", "cloud", "torch", "torch-cpu"])
def test_lock_agrees_with_the_tested_versions(lock: str) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    found = locked(lock)
    assert found
    assert {name: found[name] for name in found.keys() & tested.keys()} == {
        name: tested[name] for name in found.keys() & tested.keys()
    }


def test_edge_lock_has_no_framework() -> None:
    assert not locked("edge").keys() & {"torch", "flwr", "onnx", "ray", "sqlalchemy", "fastapi"}


@pytest.mark.parametrize("image", IMAGES)
def test_image_installs_by_hash_and_nothing_beside(image: str) -> None:
    recipe = (ROOT / f"Dockerfile.{image}").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install [^&]*", recipe)
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(installs[1].split())

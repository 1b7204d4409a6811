"""A bill of materials of what is installed here, as CycloneDX 1.6 JSON: `python deploy/sbom.py [EXTRA …] > sbom.json`.

Laws of the file: it names what the distribution `shoal` really pulls in where it runs (an image, a device), with the
versions that are there, not those that were wished for; the same environment gives the same bytes, so that two images
can be compared. Source: https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "shoal"


def bill(extras: tuple[str, ...] = ()) -> dict[str, Any]:
    """The bill of `shoal` with these extras.

    Raises:
        PackageNotFoundError: shoal, or something that it needs, is not installed here.
    """
    needs: dict[str, list[str]] = {}
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(ROOT, extra) for extra in ("", *extras)]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = distribution(name)
        below = needs.setdefault(name, [])
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            below.append(needed)
            queue += [(needed, each) for each in ("", *requirement.extras)]
    components = [_component(name, found[name]) for name in sorted(found)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": next(each for each in components if each["name"] == ROOT)},
        "components": [each for each in components if each["name"] != ROOT],
        "dependencies": [
            {"ref": _reference(found[name]), "dependsOn": sorted({_reference(found[each]) for each in below})}
            for name, below in sorted(needs.items())
        ],
    }


def _component(name: str, found: Distribution) -> dict[str, Any]:
    license_text = (found.metadata.get_all("License-Expression") or [""])[0]
    plain: dict[str, Any] = {
        "type": "application" if name == ROOT else "library",
        "bom-ref": _reference(found),
        "name": name,
        "version": found.version,
        "purl": _reference(found),
    }
    return plain | ({"licenses": [{"expression": license_text}]} if license_text else {})


def _reference(found: Distribution) -> str:
    return f"pkg:pypi/{canonicalize_name(found.metadata['Name'])}@{found.version.replace('+', '%2B')}"


if __name__ == "__main__":
    try:
        json.dump(bill(tuple(sys.argv[1:])), sys.stdout, indent=2, sort_keys=True)
    except PackageNotFoundError as error:
        print(f"error: {error.name} is not installed here", file=sys.stderr)
        print("hint: run it with the Python of the installation that the bill is of", file=sys.stderr)
        raise SystemExit(2) from error
    print()

"""Files for deployment: the locked requirements, the image, and what runs in it."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tinyqueue

ROOT = Path(tinyqueue.__file__).parent


# Locked requirements --------------------------------------------------------------------------------------------------


def declared() -> dict[str, Requirement]:
    """What setup.cfg requires at run time, without extras."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def locked() -> dict[str, tuple[Requirement, str]]:
    """What requirements.txt locks, each with the lines that follow it: its hashes and who needs it."""
    text = (ROOT / "requirements.txt").read_text()
    entries = re.findall(r"^([a-z0-9].*?) \\\n((?: .*\n)+)", text, re.M)
    requirements = [(Requirement(line), rest) for line, rest in entries]
    return {canonicalize_name(requirement.name): (requirement, rest) for requirement, rest in requirements}


def test_lock_pins_every_dependency_at_a_version_that_setup_cfg_allows() -> None:
    pins = {name: str(requirement.specifier).removeprefix("==") for name, (requirement, _) in locked().items()}
    refused = {name: pins.get(name) for name, rule in declared().items() if pins.get(name, "0") not in rule.specifier}
    assert refused == {}, "renew requirements.txt; docs/deploy.md has the command"


def test_lock_contains_nothing_that_no_dependency_needs() -> None:
    direct = {name for name, (_, rest) in locked().items() if re.search(r"tinyqueue \(setup\.cfg\)$", rest, re.M)}
    assert direct == declared().keys(), "renew requirements.txt; docs/deploy.md has the command"
    parents = re.findall(r"^    #(?: via)? +([a-z0-9-]+)$", "".join(rest for _, rest in locked().values()), re.M)
    assert {parent for parent in parents if parent != "via"} <= locked().keys()


def test_lock_has_an_exact_version_and_hashes_for_every_requirement() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match("[^ #]", line)]
    assert len(lines) == len(locked()) > len(declared())
    for requirement, rest in locked().values():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier))
        assert re.search(r"^    --hash=sha256:[0-9a-f]{64}\b", rest, re.M)

"""The README tells the truth: places that exist, flags that exist, commands that are understood."""

import re
import shlex
from pathlib import Path

import pytest

import wombet

ROOT = Path(wombet.__file__).parent
README = (ROOT / "README.md").read_text()
FLAGS = {flag for action in wombet.build_parser()._actions for flag in action.option_strings}


def table(heading):
    part = README.split(f"## {heading}")[1].split("\n## ")[0]
    return [line for line in part.splitlines() if line.startswith("|")][2:]


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`([\w/]+\.py:\w+)`", README))))
def test_each_place_of_the_map_exists(place):
    file, name = place.split(":")
    assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.M)


def test_each_departure_has_flags_which_the_preset_sets():
    named = set()
    for number, row in enumerate(table("Where it departs"), 1):
        cells = row.split("|")
        assert cells[1].strip() == str(number)
        flags = re.findall(r"--[\w-]+", cells[-2])
        assert flags and set(flags) <= FLAGS
        keys = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
        assert keys <= set(wombet.PAPER), row
        named |= keys
    assert named == set(wombet.PAPER)


def test_each_departure_is_marked_with_its_number():
    files = ("wombet", "agent", "replay", "mpc", "filter", "world_model")
    code = "".join((ROOT / f"{name}.py").read_text() for name in files)
    marked = {int(number) for number in re.findall(r"Deviation (\d+):", code)}
    assert marked == set(range(1, 1 + len(table("Where it departs")))) and "Deviation:" not in code


def test_each_flag_that_matters_exists():
    assert {flag for row in table("The flags that matter") for flag in re.findall(r"--[\w-]+", row)} <= FLAGS


@pytest.mark.parametrize("command", re.findall(r"^python wombet\.py (.*)$", README, re.M))
def test_each_command_is_understood(command):
    flags = shlex.split(command)
    assert {flag for flag in flags if flag.startswith("--")} <= FLAGS
    if not {"--resume", "--evaluate"} & set(flags):  # they need a run
        wombet.parse_args(flags)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_each_link_leads_somewhere(link):
    assert (ROOT / link).exists()

"""What is shipped: the wheel with its recipes and facts, the pins, the make targets."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_carries_the_package_and_its_recipes(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "spdcli").rglob("*.py")}
    assert sources <= names
    assert wheel.read("spdcli/edits/facts.toml") == (ROOT / "spdcli/edits/facts.toml").read_bytes()
    for recipe in (ROOT / "recipes").glob("*.toml"):
        assert wheel.read(f"spdcli/recipes/{recipe.name}") == recipe.read_bytes()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"spdcli", "spd_cli"}


def test_an_unpacked_wheel_finds_its_recipes_from_anywhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); from spdcli.recipe.reading import shipped; print(*shipped().values())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [Path(path) for path in done.stdout.split()]
    assert {path.name for path in found} == {path.name for path in (ROOT / "recipes").glob("*.toml")}
    assert all((tmp_path / path).is_relative_to(tmp_path / "site") for path in found)


def test_the_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    information = {name.partition("dist-info/")[2]: name for name in wheel.namelist() if "dist-info/" in name}
    assert b"spd = spdcli.cli:main" in wheel.read(information["entry_points.txt"])
    assert b"the spd authors" in wheel.read(information["licenses/LICENSE"])


def test_every_direct_dependency_is_pinned_to_a_version_in_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in PINS)}
    extras = PROJECT["optional-dependencies"]
    tools = [text for extra in ("gguf", "dev", "docs", "release") for text in extras[extra]]
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *tools]]
    for requirement in wanted:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
        assert all(clause.operator == ">=" for clause in requirement.specifier), (
            "ranges stay wide; pins are constraints"
        )


def test_constraints_are_plain_pins() -> None:
    assert [pin for pin in PINS if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*(post[0-9]+)?", pin)] == []
    names = [pin.partition("==")[0].lower() for pin in PINS]
    assert names == sorted(names)


def test_make_and_ci_offer_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("setup", "demo", "test", "coverage", "audit", "check", "format", "results", "docs", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert re.search(r"^lowest newest python3\.11 python3\.12 python3\.13: setup$", makefile, re.MULTILINE)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert "make check test" in (ROOT / ".ci/run").read_text()

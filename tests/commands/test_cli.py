"""The `spd` command: quick to start, one line an error, exit codes, help with lines to copy, `spd recipe`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spdcli import __version__, cli
from spdcli.commands import recipe as recipe_command
from spdcli.errors import Interrupted, RecipeError, RecipeProblem, SpdError, UsageError

ROOT = Path(__file__).parents[2]
BROKEN = 'name = "x"\nseed = -1\n[losses]\nfaithfullness = 1\n'

Answer = tuple[int, str, str]
Spd = Callable[..., Answer]


@pytest.fixture
def spd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spd:
    """Runs `spd` in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["spd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code, out, err  # type: ignore[return-value]

    return run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.toml"
    path.write_text(BROKEN)
    return path


# --- start -----------------------------------------------------------------------------------------

LIGHT = [["--help"], ["recipe", "check", "recipes/gpt2.toml"], ["recipe", "ls"], ["decompose", "no-such-recipe"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = {["spd", *arguments]!r}
from spdcli.cli import main
try:
    main()
except SystemExit:
    heavy = {{"torch", "transformers", "matplotlib", "numpy", "scipy", "safetensors"}} & set(sys.modules)
    sys.stderr.write(f"heavy: {{sorted(heavy)}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.endswith("heavy: []"), done.stderr


SMALLEST = """
import pydantic, rich.table, typer
from typing import Annotated

class Model(pydantic.BaseModel):
    x: list[str]

app = typer.Typer(add_completion=False)

@app.command()
def check(x: Annotated[list[str], typer.Argument()]): Model(x=x)

@app.command()
def other(): pass

app(["check", "1"])
"""


def processor_seconds(*arguments: str) -> float:
    """What a Python process took of the processors, whatever else they do."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("arguments", LIGHT[:2], ids=" ".join)
def test_light_commands_take_little_more_than_their_libraries(arguments: list[str]) -> None:
    """A ratio, in turns, to the smallest program of the same libraries: machines differ."""
    rounds = [(processor_seconds("-m", "spdcli", *arguments), processor_seconds("-c", SMALLEST)) for _ in range(5)]
    ours, smallest = map(min, zip(*rounds, strict=True))
    assert ours < 2.2 * smallest


def test_importing_the_package_is_instant_and_load_is_there() -> None:
    code = "import sys, spdcli; print(sorted({'torch', 'typer', 'pydantic', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    import spdcli

    assert callable(spdcli.load)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = spdcli.lode


def test_version(spd: Spd) -> None:
    assert spd("--version") == (0, f"spd {__version__}\n", "")


# --- help ------------------------------------------------------------------------------------------

COMMANDS: dict[str, Any] = {
    **{command.name: command for command in cli.app.registered_commands},
    **{f"recipe {command.name}": command for command in recipe_command.app.registered_commands},
}


def test_help_groups_the_commands(spd: Spd) -> None:
    code, out, _ = spd("--help")
    assert code == 0
    rows = (" Build ", "│ train", "│ decompose", " Look ", "│ eval", "│ inspect", " Recipes ", "│ recipe")
    places = [out.index(row) for row in rows]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_ends_with_lines_to_copy(name: str, spd: Spd) -> None:
    code, out, _ = spd(*name.split(), "--help")
    assert code == 0
    epilog = COMMANDS[name].epilog.splitlines()
    assert 2 <= len(epilog) <= 3
    assert [line.strip() for line in out.rstrip().splitlines()[-len(epilog) :]] == epilog
    for line in epilog:
        assert line.startswith(f"spd {name}")
        shlex.split(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_shared_options(name: str, spd: Spd) -> None:
    _, out, _ = spd(*name.split(), "--help")
    for option in ("--json", "-q", "-v"):
        assert option in out


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "err"),
    [
        (["compare", "gpt2"], "error: Missing option '--with'.\nhint: spd compare --help\n"),
        (["plan", "--such"], "error: No such option: --such\nhint: spd plan --help\n"),
        (["recipe", "sho"], "error: No such command 'sho'. Did you mean 'show'?\nhint: spd recipe --help\n"),
        (
            ["bench", "stepp"],
            "error: Invalid value for 'what': 'stepp' is not one of 'importance', 'step', 'scaling', 'allocator', "
            "'memory'.\nhint: spd bench --help\n",
        ),
        (
            ["compare", "gpt2", "--with", "losses.bogus=1"],
            "error: --with losses.bogus=1: [losses] unknown key 'bogus'\n"
            "hint: `spd recipe show gpt2` prints its settings\n",
        ),
        (
            ["compare", "gpt2", "--with", "bogus"],
            "error: --with bogus: expected a key, = and a value\nhint: for example --with losses.minimality=0.1\n",
        ),
    ],
)
def test_a_mistake_in_the_command_line_is_a_line(arguments: list[str], err: str, spd: Spd) -> None:
    assert spd(*arguments) == (2, "", err)


@pytest.mark.parametrize("arguments", [[], ["recipe"]])
def test_a_command_that_needs_another_shows_its_help(arguments: list[str], spd: Spd) -> None:
    code, out, err = spd(*arguments)
    assert (code, err) == (2, "")
    assert "Usage: spd" in out


@pytest.mark.parametrize(
    ("raised", "code", "err"),
    [
        (SpdError("no run here", "make one"), 1, "error: no run here\nhint: make one\n"),
        (UsageError("no such token [x]"), 2, "error: no such token [x]\n"),
        (RecipeError([RecipeProblem("a.toml", 2, "b", "[b] wrong")]), 2, "error: a.toml:2: [b] wrong\n"),
        (Interrupted("at step 3", "--resume"), 130, "interrupted: at step 3\nhint: --resume\n"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted: stopped; what is written is whole\nhint: the same command begins again\n",
        ),
        (BrokenPipeError(), 1, ""),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory\n"),
        (
            RuntimeError("two\nlines"),
            1,
            "error: internal error: RuntimeError: two lines\nhint: this is a bug in spd: run again with SPD_DEBUG=1 "
            "for the traceback, and report it\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_a_line_and_an_exit_code(
    raised: BaseException, code: int, err: str, spd: Spd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPD_DEBUG", raising=False)
    monkeypatch.setattr("spdcli.recipe.reading.shipped", lambda: (_ for _ in ()).throw(raised))
    assert spd("recipe", "ls") == (code, "", err)


def test_a_traceback_only_for_who_asks(spd: Spd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_DEBUG", "1")
    monkeypatch.setattr("spdcli.recipe.reading.shipped", lambda: 1 / 0)
    code, out, err = spd("recipe", "ls")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert "error: internal error: ZeroDivisionError: division by zero\n" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["decompos"], "decompose"),
        (["decompose"], "recipe"),
        (["decompose", "gpt2", "--device", "tpu"], "tpu"),
        (["decompose", "gpt2", "--set"], "--set"),
        (["decompose", "gpt2", "--set", "losses.recon"], "expected a key"),
        (["recipe", "ls", "-q", "-v"], "contradict"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_code_two_and_names_what_is_wrong(arguments: list[str], said: str, spd: Spd) -> None:
    code, out, err = spd(*arguments)
    assert (code, out) == (2, "")
    assert said in err.lower()
    assert "Traceback" not in err


def test_a_recipes_mistakes_come_before_the_work(spd: Spd, broken: Path) -> None:
    code, out, err = spd("decompose", broken)
    assert (code, out) == (2, "")
    assert f"error: {broken}:2: seed = -1: expected a whole number of at least 0\n" in err
    assert f"error: {broken}:4: [losses] unknown key 'faithfullness' (did you mean 'faithfulness'?)\n" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "spdcli", "recipe", "show", "gpt2"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.stderr == b""


# --- spd recipe ------------------------------------------------------------------------------------


def test_ls_in_every_mode(spd: Spd) -> None:
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
    assert {"gpt2", "induction", "smollm2-facts", "tms-5-2"} <= set(names)
    assert sorted(line.split()[0] for line in spd("recipe", "ls")[1].splitlines()) == names
    assert sorted(spd("recipe", "ls", "-q")[1].split()) == names
    data = json.loads(spd("recipe", "ls", "--json")[1])
    assert data["schema"] == "spd.recipe.ls/1"
    assert sorted(recipe["name"] for recipe in data["recipes"]) == names
    assert all(recipe["about"] for recipe in data["recipes"])


def test_show_prints_the_file_as_it_is(spd: Spd) -> None:
    text = (ROOT / "recipes/gpt2.toml").read_text()
    assert spd("recipe", "show", "gpt2") == (0, text, "")
    data = json.loads(spd("recipe", "show", "gpt2", "--json")[1])
    assert (data["schema"], data["recipe"]["slices"]["C"]) == ("spd.recipe.show/1", 768)
    assert spd("recipe", "show", "gpt3")[0] == 2


def test_cp_writes_a_recipe_and_says_where(spd: Spd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "recipes/gpt2.toml").read_text()
    assert spd("recipe", "cp", "gpt2") == (0, "gpt2.toml\n", "")
    assert Path("gpt2.toml").read_text() == text
    code, out, err = spd("recipe", "cp", "induction", "gpt2.toml")
    assert (code, out) == (2, "")
    assert err.startswith("error: gpt2.toml: is already there\nhint: ")
    assert Path("gpt2.toml").read_text() == text
    assert spd("recipe", "cp", "induction", "gpt2.toml", "--force")[0] == 0
    Path("folder").mkdir()
    assert spd("recipe", "cp", "smollm2", "folder", "-q")[1] == "folder/smollm2.toml\n"
    assert json.loads(spd("recipe", "cp", "smollm2", "s.toml", "--json")[1])["path"] == "s.toml"
    assert spd("recipe", "cp", "smollm2", "nowhere/s.toml")[0] == 2


def test_check_says_ok_and_what_it_comes_to(spd: Spd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = spd("recipe", "check", "recipes/gpt2.toml", "induction")
    assert (code, err) == (0, "")
    assert out.startswith("recipes/gpt2.toml: ok\n  target      openai-community/gpt2")
    assert "\ninduction: ok\n" in out
    assert spd("recipe", "check", "gpt2", "-q") == (0, "", "")


def test_check_tells_all_mistakes_of_all_files(spd: Spd, broken: Path) -> None:
    code, out, err = spd("recipe", "check", "gpt2", broken, "nowhere.toml")
    assert code == 2
    assert out.startswith("gpt2: ok\n")
    for line in (f"error: {broken}:2: seed", f"error: {broken}:4: [losses]", "error: nowhere.toml: no such recipe"):
        assert line in err


def test_check_in_json_is_one_object(spd: Spd, broken: Path) -> None:
    code, out, err = spd("recipe", "check", "gpt2", broken, "--json")
    assert (code, err) == (2, "")
    good, bad = json.loads(out)["files"]
    assert (good["ok"], good["recipe"]["slices"]["C"], bad["ok"]) == (True, 768, False)
    assert {"source": str(broken), "line": 4, "key": "losses.faithfullness"}.items() <= bad["problems"][-1].items()


def test_check_takes_overrides(spd: Spd) -> None:
    code, _, err = spd("recipe", "check", "gpt2", "--set", "losses.recon=x", "--set", "slices.C=0")
    assert code == 2
    assert "error: --set losses.recon=x: [losses] recon = 'x': expected a number of at least 0\n" in err
    assert "error: --set slices.C=0: [slices] C = 0: expected a whole number of at least 1\n" in err

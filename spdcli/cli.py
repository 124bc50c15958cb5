"""The `spd` command: registers the subcommands, and turns every error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from spdcli import __version__
from spdcli.commands import facts, recipe
from spdcli.commands.ablate import ablate
from spdcli.commands.bench import bench
from spdcli.commands.certify import certify
from spdcli.commands.compare import compare
from spdcli.commands.decompose import decompose
from spdcli.commands.doctor import doctor
from spdcli.commands.evaluate import evaluate
from spdcli.commands.exchange import export, import_checkpoint
from spdcli.commands.explore import explore
from spdcli.commands.graph import graph
from spdcli.commands.harvest import harvest
from spdcli.commands.inspect import inspect
from spdcli.commands.locate import locate
from spdcli.commands.plan import plan
from spdcli.commands.push import push
from spdcli.commands.report import report
from spdcli.commands.reproduce import reproduce
from spdcli.commands.search import search
from spdcli.commands.suppress import suppress
from spdcli.commands.svd import svd
from spdcli.commands.trace import trace
from spdcli.commands.train import train
from spdcli.console import Console
from spdcli.errors import Interrupted, SpdError, UsageError

BUILD, LOOK, CHANGE, RECIPES = "Build", "Look", "Change", "Recipes"

app = typer.Typer(
    name="spd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="spd recipe ls\nspd decompose induction-quick --out run\nspd eval run",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spd {__version__}")
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)]


@app.callback()
def spd(version: Version = False) -> None:
    """Take a transformer's weights apart into rank-1 slices, and see which of them matter where.

    A recipe names the target and how to decompose it; a run directory
    holds the result, and the other commands read it.
    """


COMMANDS = (
    ("train", train, BUILD, "spd train induction-quick --out toy\nspd train recipes/induction.toml --seed 1"),
    (
        "decompose",
        decompose,
        BUILD,
        "spd decompose induction-quick --out run\nspd decompose smollm2-text --data texts.txt\n"
        "spd decompose recipes/gpt2.toml --out run --resume",
    ),
    (
        "plan",
        plan,
        BUILD,
        "spd plan recipes/gpt2.toml\nspd plan induction --set decompose.batch=64\nspd plan smollm2 --json | jq .bytes",
    ),
    (
        "reproduce",
        reproduce,
        BUILD,
        "spd reproduce induction --seeds 5 --out five\nspd reproduce facts --seeds 3 --out facts\n"
        "spd reproduce planted --seeds 5 --out planted",
    ),
    (
        "compare",
        compare,
        LOOK,
        "spd compare induction-quick --with losses.layerwise_matrices=2\n"
        "spd compare smollm2 --with importance.basis=full --set decompose.steps=200",
    ),
    ("eval", evaluate, LOOK, "spd eval run\nspd eval run --json | jq .total_active\nspd eval run --adversary curve"),
    (
        "certify",
        certify,
        LOOK,
        "spd certify run\nspd certify run --against other --script edits.toml\n"
        "spd certify run --recipe induction-quick --set certify.pgd_shared=0.1",
    ),
    (
        "inspect",
        inspect,
        LOOK,
        "spd inspect run --token Bryant\nspd inspect run --token Bryant --json | jq '.occurrences[0].slices'"
        "\nspd inspect run --slice layers.0.mlp.up_proj:2",
    ),
    (
        "harvest",
        harvest,
        LOOK,
        "spd harvest run\nspd harvest run --data texts.txt --tokens 1000000\n"
        "spd harvest run --json | jq '.slices[] | {slice, density}'",
    ),
    (
        "search",
        search,
        LOOK,
        "spd search run 'New York'\nspd search run 'New York' --json | jq '.matches[0].slice'",
    ),
    ("explore", explore, LOOK, "spd explore run\nspd explore run --prompt 'Kobe Bryant plays professional'"),
    (
        "locate",
        locate,
        LOOK,
        "spd locate run --prompt 1 --token basketball\nspd locate run --matrix 'layers.0.mlp.*' --others-limit 0.02"
        "\nspd locate run --no-facts --json | jq '.pairs[0]'",
    ),
    (
        "graph",
        graph,
        LOOK,
        "spd graph run --out graph.json\nspd graph run --prompt 'Tiger Woods plays' --top 50 --out golf.json",
    ),
    (
        "svd",
        svd,
        LOOK,
        "spd svd run\nspd svd run --tolerance 1e-4 --method greedy_svd\nspd svd run --json | jq .result.spd",
    ),
    (
        "bench",
        bench,
        LOOK,
        "spd bench step --case toy-64\nspd bench importance --threads 1\nspd bench step --json | jq .ratios",
    ),
    ("doctor", doctor, LOOK, "spd doctor\nspd doctor --json | jq -r .next"),
    (
        "trace",
        trace,
        LOOK,
        "spd trace run --subject 'Kobe Bryant' --subject 'Tiger Woods'\n"
        "spd trace gpt2 --prompt 'Golf is what Tiger Woods plays' --subject Tiger",
    ),
    (
        "report",
        report,
        LOOK,
        "spd report run\nspd report run --subject 'Kobe Bryant' --subject 'Tiger Woods' --out where\n"
        "spd report run --json | jq '.prompts[].rows[] | {name, own}'",
    ),
    (
        "import",
        import_checkpoint,
        BUILD,
        "spd import model_50000.pth gpt2 --out theirs\nspd import theirs.safetensors my-model.toml --out theirs",
    ),
    ("export", export, LOOK, "spd export run --out model.pth\nspd export run --out model.safetensors"),
    ("push", push, LOOK, "spd push run --out shared\nspd push run --repo me/induction-slices --private"),
    (
        "ablate",
        ablate,
        CHANGE,
        "spd ablate run --slice h.0.mlp.c_fc:12\nspd ablate run --slice h.0.mlp.c_fc:12 --others importance --json"
        "\nspd ablate run --mlp all --figure",
    ),
    (
        "suppress",
        suppress,
        CHANGE,
        "spd suppress run --slice h.0.mlp.c_fc:12 --patch edit.safetensors\n"
        "spd suppress run --script edits.toml --dry-run\n"
        "spd suppress run --revert edit.safetensors --base edited --save restored",
    ),
)
for name, function, panel, examples in COMMANDS:
    app.command(name, rich_help_panel=panel, epilog=examples)(function)
app.add_typer(facts.app, name="facts", rich_help_panel=LOOK)
app.add_typer(recipe.app, name="recipe", rich_help_panel=RECIPES)


def main() -> NoReturn:
    """Runs `spd` with the command line's arguments and exits.

    Exit codes: 0 done, 1 the answer is no, 2 usage, recipe or a missing run, 130 interrupted.
    """
    _open_standard_streams()
    with _ends_heard():
        try:
            _require_a_here()
            code = app(prog_name="spd", standalone_mode=False) or 0  # of --help, --version, and of Ctrl-C to typer
            if code == Interrupted.exit_code:
                raise KeyboardInterrupt
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except KeyboardInterrupt:
            code = _report(Interrupted("stopped; what is written is whole", "the same command begins again"))
        except BrokenPipeError:
            code = 1
        except Exception as error:
            code = _report(error)
    sys.exit(_after_flush(code))


def _open_standard_streams() -> None:
    """Give the numbers of closed standard streams to nobody else, and every text a form in the terminal's encoding.

    Otherwise the next file of a run would get the number, and with it what libraries print. `sys.stdout` stays None
    where it was closed, so that an answer is not lost in silence.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the end
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


@contextmanager
def _ends_heard() -> Iterator[None]:
    """While open, a shutdown, and a terminal that goes, end a command as Ctrl-C does: by what it has to put away."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # Not where `nohup`, or the program that calls this one, has its own answer.
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _report(error: Exception) -> int:
    """One line for the user, and the exit code; the traceback only for who asks with SPD_DEBUG=1."""
    if os.environ.get("SPD_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    expected = as_expected(error)
    if expected.message:  # a command alone has shown its help instead
        Console().error(expected)
    return expected.exit_code


def as_expected(error: Exception) -> SpdError:
    if isinstance(error, SpdError):
        return error
    if hasattr(error, "format_message"):  # typer's own, of an option or a command
        command = getattr(getattr(error, "ctx", None), "command_path", "spd")
        return UsageError(error.format_message().replace("Value error, ", ""), f"{command} --help")
    if isinstance(error, OSError) and error.strerror:
        return SpdError(f"{error.filename or 'a file or stream'}: {error.strerror}")
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    hint = "this is a bug in spd: run again with SPD_DEBUG=1 for the traceback, and report it"
    return SpdError(f"internal error: {detail}", hint)


def _require_a_here() -> None:
    """SpdError where the directory that the command runs in is gone, which libraries end a process for."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise SpdError("the directory that the command runs in was removed", "cd to another one") from None


def _after_flush(code: int) -> int:
    """A reader that went away (`| head`) is no error to talk about: drop what it does not want.

    What a full disk did not take was told when it was written.
    """
    for stream, failed in ((sys.stdout, 1), (sys.stderr, 0)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or failed
    return code

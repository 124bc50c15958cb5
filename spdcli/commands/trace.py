"""`spd trace`: causal tracing, which places of a run restore a corrupted fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spdcli.commands.edit_options import Prompt
from spdcli.commands.options import (
    Device,
    Json,
    Noise,
    Quiet,
    Seed,
    Sigma,
    Subjects,
    Verbose,
    Window,
    make_console,
)
from spdcli.commands.prompt_option import read_prompts
from spdcli.console import Console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from spdcli.engine.target import Target
    from spdcli.location.tracing import Trace, TraceSettings

ModelOrRun = Annotated[
    str,
    typer.Argument(
        help="A hub id, a directory, a .gguf file, package:NAME/FILE, or a run directory.", metavar="MODEL|RUN"
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, max=10**6, help="Draws of the noise.")]
BeginToken = Annotated[
    bool | None,
    typer.Option(
        "--begin-token/--no-begin-token",
        help="Whether the begin-of-sequence token comes first.",
        show_default="as the run, or the tokenizer, does",
    ),
]
FigureFolder = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Where the figures go.", show_default="RUN/figures, or trace for a model"),
]
WIDE = 0.5  # of the blocks: a window above this restores nearly the same at every block


def trace(
    model: ModelOrRun,
    prompt: Prompt = None,
    subject: Subjects = None,
    noise: Noise = 3.0,
    sigma: Sigma = None,
    samples: Samples = 10,
    window: Window = 10,
    begin_token: BeginToken = None,
    out: FigureFolder = None,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Causal tracing: corrupt a prompt's subject, restore one place, see whether the answer comes back.

    Noise on the subject's embeddings makes the model lose the answer, the
    prompt's last token. Then what leaves one block, or what a window of MLPs or
    attention layers writes, is put back at one token: at every token and block,
    averaged over draws (Figures 7 and 8). The best places are told apart: at the
    subject's own tokens, and at those after it, where the last ones can always
    restore the answer. In reverse, the corrupted piece goes into the clean run.
    """
    console = make_console(json, quiet, verbose)
    from spdcli.location.tracing import TraceSettings
    from spdcli.location.tracing import trace as trace_texts

    source = open_traceable(model, read_prompts(prompt), begin_token, device)
    settings = TraceSettings(noise, sigma, samples, window, source.seed if seed is None else seed)
    blocks = len(source.target.blocks)
    if window > WIDE * blocks:
        console.warn(
            f"a window of {window} blocks of {blocks} is nearly the same one everywhere; --window 3 tells more apart"
        )
    model_and_texts = (source.target, source.tokenizer, source.texts)
    with console.progress() as report:
        traces = trace_texts(*model_and_texts, subject or [], settings, source.begin_token, report)
    warn_of_raised(console, traces)
    head = {"schema": "spd.trace/1", "model": model, "noise": noise, "samples": samples, "window": window}
    figures = draw(traces, out or source.figures)
    data = head | {"seed": settings.seed, "layers": blocks, "prompts": traces, "figures": figures}
    console.show(data, *(table(one, settings) for one in traces))
    for path in figures:
        if path.suffix == ".png":
            console.result(path)


def warn_of_raised(console: Console, traces: Sequence[Trace]) -> None:
    """A warning for every prompt whose answer noise makes likelier."""
    for one in traces:
        if one.raised:
            console.warn(
                f"{one.prompt!r}: noise raises P({one.answer!r}) from {one.clean:.4f} to {one.corrupted:.4f}, so that "
                "there is nothing to restore; try more or less --noise, or another --subject"
            )


@dataclass(frozen=True, eq=False)
class Traceable:
    """What `MODEL|RUN` and `--prompt` name: a target, its tokenizer, the prompts, and what a run knows by itself."""

    target: Target
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    begin_token: bool | None
    figures: Path
    seed: int


def open_traceable(model: str, prompts: Sequence[int | str], begin_token: bool | None, device: str | None) -> Traceable:
    """The run or the model that `model` names, and `prompts`, or the run's own where there are none."""
    from spdcli.measures.texts import prompt_texts
    from spdcli.recipe.choices import TOYS
    from spdcli.runs.directory import FIGURES, RECIPE, RunDirectory
    from spdcli.runs.fingerprint import require_same_weights
    from spdcli.runs.subject import choose_device, open_subject
    from spdcli.targets.huggingface import build_target, load_model

    if (Path(model) / RECIPE).exists():
        recipe = RunDirectory.open(Path(model)).recipe
        if recipe.data is None:
            kind = TOYS.get(recipe.target.kind)
            own = "a module of your own" if kind is None else kind.about
            raise UsageError(f"{model}: its target is {own}, and causal tracing needs a language model")
        subject = open_subject(recipe, choose_device(device or recipe.device))
        require_same_weights(Path(model), subject.target)
        assert subject.prompts is not None
        tokenizer = subject.prompts.tokenizer
        begin = subject.prompts.begin_token if begin_token is None else begin_token
        texts = prompt_texts(subject.prompts.texts, prompts) or subject.prompts.texts
        return Traceable(subject.target, tokenizer, texts, begin, Path(model) / FIGURES, recipe.seed)
    if not prompts:
        raise UsageError("nothing to trace", "give --prompt TEXT; its last token is the answer")
    number = next((prompt for prompt in prompts if isinstance(prompt, int)), None)
    if number is not None:
        hint = f"give a run, or a text; --prompt ={number} is the text {number}"
        raise UsageError(f"--prompt {number}: {model} is a model, which has no prompts of its own", hint)
    texts = prompt_texts((), prompts)
    language_model = load_model(model, "float32")
    language_model.model.to(choose_device(device or "auto"))
    target = build_target(language_model, split_attention=False)
    return Traceable(target, language_model.tokenizer, texts, begin_token, Path("trace"), 0)


def draw(traces: Sequence[Trace], folder: Path) -> list[Path]:
    """A figure a prompt (Figures 7 and 8)."""
    from spdcli.figures.facts import save_trace

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"trace-{number}" for number in range(1, len(traces) + 1)] if len(traces) > 1 else ["trace"]
    return [path for name, trace in zip(names, traces, strict=True) for path in save_trace(trace, folder, name)]


def table(result: Trace, settings: TraceSettings) -> Table:
    """The best sites of one prompt."""
    from rich.table import Table

    best = Table(
        title=f"{result.prompt}: P({result.answer!r}) = {result.clean:.4f}, "
        f"corrupted {result.corrupted:.4f} ± {result.corrupted_standard_error:.4f}",
        caption=f"{settings.samples} draws of noise, {settings.noise:g} × {result.sigma:.4f}; "
        f"windows of {settings.window} of {len(result.sites['state'].effect[0])} layers",
    )
    for name in ("restored", "best at", "token", "layer", "P", "indirect effect", "in reverse, P"):
        best.add_column(name, justify="left" if name in ("restored", "best at", "token") else "right")
    for site in result.best:
        first, last = site.layers
        best.add_row(
            {"state": "hidden state", "mlp": "MLPs", "attention": "attention"}[site.kind],
            {"subject": "the subject", "after": "after it"}[site.where],
            repr(result.tokens[site.position]),
            f"{site.layer}" if first == last else f"{site.layer} ({first} to {last})",
            f"{result.corrupted + site.effect:.4f}",
            f"{site.effect:+.4f} ± {site.standard_error:.4f}",
            f"{site.reverse:.4f}",
        )
    return best

"""`spd trace`: causal tracing, which places of a run restore a corrupted fact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spdcli.commands.change import Prompt, read_prompts
from spdcli.commands.options import Device, Json, Quiet, Seed, Verbose, make_console
from spdcli.console import Console
from spdcli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from spdcli.engine.target import Target
    from spdcli.location.tracing import TraceSettings
    from spdcli.targets.prompts import Prompts

ModelOrRun = Annotated[
    str,
    typer.Argument(
        help="A hub id, a directory, a .gguf file, package:NAME/FILE, or a run directory.", metavar="MODEL|RUN"
    ),
]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        "--subject",
        help="The words to corrupt; may be repeated, for prompts about others.",
        show_default="the subjects that the facts name",
    ),
]
Noise = Annotated[float, typer.Option("--noise", min=0.0, help="Noise, in standard deviations of the embeddings.")]
Sigma = Annotated[
    float | None,
    typer.Option("--sigma", min=0.0, help="One of them, instead of the embedding matrix's.", show_default=False),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Draws of the noise.")]
Window = Annotated[int, typer.Option("--window", min=1, help="Blocks whose MLPs (or attention) are restored at once.")]
BeginToken = Annotated[
    bool, typer.Option("--begin-token", help="Put the model's begin-of-sequence token first; a run knows by itself.")
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
    begin_token: BeginToken = False,
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

    target, prompts, folder, run_seed = open_prompts(model, read_prompts(prompt), begin_token, device)
    settings = TraceSettings(noise, sigma, samples, window, run_seed if seed is None else seed)
    blocks = len(target.blocks)
    if window > WIDE * blocks:
        console.warn(
            f"a window of {window} blocks of {blocks} is nearly the same one everywhere; --window 3 tells more apart"
        )
    traced = trace_prompts(console, target, prompts, subject or [], settings)
    head = {"schema": "spd.trace/1", "model": model, "noise": noise, "samples": samples, "window": window}
    data = head | {"seed": settings.seed, "layers": blocks, "prompts": traced}
    figures = draw(data, out or folder)
    console.show(data | {"figures": figures}, *(table(entry, data) for entry in traced))
    for path in figures:
        if path.suffix == ".png":
            console.result(path)


def open_prompts(
    model: str, texts: list[str], begin_token: bool, device: str | None
) -> tuple[Target, Prompts, Path, int]:
    """The target that `model` names, the prompts, where figures go, and the default seed."""
    from spdcli.runs.directory import FIGURES, RECIPE, RunDirectory
    from spdcli.runs.subject import choose_device, open_subject
    from spdcli.targets.huggingface import build_target, load_model
    from spdcli.targets.prompts import encode

    if (Path(model) / RECIPE).exists():
        recipe = RunDirectory.open(Path(model)).recipe
        if recipe.data is None:
            raise UsageError(f"{model}: its target is the induction toy, and causal tracing needs a language model")
        subject = open_subject(recipe, choose_device(device or recipe.device))
        assert subject.prompts is not None
        chosen = texts or recipe.data.prompts
        prompts = encode(subject.prompts.tokenizer, chosen, "held_out", begin_token or recipe.data.begin_token)
        return subject.target, prompts, Path(model) / FIGURES, recipe.seed
    if not texts:
        raise UsageError("nothing to trace", "give --prompt TEXT; its last token is the answer")
    language_model = load_model(model, "float32")
    language_model.model.to(choose_device(device or "auto"))
    prompts = encode(language_model.tokenizer, texts, "held_out", begin_token)
    return build_target(language_model, split_attention=False), prompts, Path("trace"), 0


def trace_prompts(
    console: Console, target: Target, prompts: Prompts, subjects: list[str], settings: TraceSettings
) -> list[dict[str, Any]]:
    """Every prompt's part of `spd.trace/1`, in order; all subjects are found before the first is traced."""
    from spdcli.edits.facts_file import load_facts
    from spdcli.location.tracing import find_questions, trace

    questions = find_questions(prompts, subjects, load_facts().subjects())
    traced = []
    with console.live() as line:
        for number, question in enumerate(questions):
            text = prompts.texts[number]
            report = lambda done, total, text=text: line.update(text, done, total)  # noqa: E731
            named = {"prompt": text, "answer": prompts.answer_texts[number], "tokens": prompts.pieces[number]}
            where = {"subject": list(question.subject)}
            traced.append(named | where | trace(target, question, settings, report))
    return traced


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """A figure a prompt."""
    from spdcli.figures.facts import save_trace

    folder.mkdir(parents=True, exist_ok=True)
    several = len(data["prompts"]) > 1
    names = [f"trace-{number + 1}" if several else "trace" for number in range(len(data["prompts"]))]
    return [
        path for name, entry in zip(names, data["prompts"], strict=True) for path in save_trace(entry, folder, name)
    ]


def table(entry: dict[str, Any], data: dict[str, Any]) -> Table:
    """The best places of one prompt."""
    from rich.table import Table

    found = Table(
        title=f"{entry['prompt']}: P({entry['answer']!r}) = {entry['clean']:.4f}, "
        f"corrupted {entry['corrupted']:.4f} ± {entry['corrupted_standard_error']:.4f}",
        caption=f"{data['samples']} draws of noise, {data['noise']:g} × {entry['sigma']:.4f}; "
        f"windows of {data['window']} of {data['layers']} layers",
    )
    for name in ("restored", "best at", "token", "layer", "P", "indirect effect", "in reverse, P"):
        found.add_column(name, justify="left" if name in ("restored", "best at", "token") else "right")
    for best in entry["best"]:
        first, last = best["layers"]
        found.add_row(
            {"state": "hidden state", "mlp": "MLPs", "attention": "attention"}[best["kind"]],
            {"subject": "the subject", "after": "after it"}[best["where"]],
            repr(entry["tokens"][best["position"]]),
            f"{best['layer']}" if first == last else f"{best['layer']} ({first} to {last})",
            f"{entry['corrupted'] + best['effect']:.4f}",
            f"{best['effect']:+.4f} ± {best['standard_error']:.4f}",
            f"{best['reverse']:.4f}",
        )
    return found

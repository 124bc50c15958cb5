"""`spd graph`: a prompt's active slices as a graph, in a file that graph viewers read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spdcli.commands.options import Device, Force, Json, Quiet, RunPath, Seed, Threshold, Verbose, make_console
from spdcli.commands.prompt_option import prompt_option, read_prompt
from spdcli.errors import UsageError

Prompt = Annotated[str, prompt_option("The prompt; another text than the run's is fed whole", True, several=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")]
Top = Annotated[int, typer.Option("--top", min=1, help="Slices to show: those of most effect on what follows.")]
Logits = Annotated[int, typer.Option("--logits", min=1, help="Tokens that may follow, the likeliest first.")]
Scan = Annotated[
    str | None, typer.Option("--scan", help="What the viewer calls the model.", show_default="the model's own name")
]


def graph(
    run: RunPath,
    out: Out = Path("graph.json"),
    prompt: Prompt = "1",
    top: Top = 100,
    logits: Logits = 5,
    threshold: Threshold = 0.0,
    scan: Scan = None,
    force: Force = False,
    device: Device = None,
    seed: Seed = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a prompt's active slices as a graph that Neuronpedia and circuit-tracer show.

    In the model made of active slices alone, a link is the exact derivative
    m ∂a/∂m of a slice's inner activation a, or of a logit, by the mask m of
    another slice, along every way that passes through no third slice.
    """
    console = make_console(json, quiet, verbose)
    if out.exists() and not force:
        raise UsageError(f"{out} is there already", "--force replaces it, or name another with --out")
    which = read_prompt(prompt)
    from spdcli import __version__
    from spdcli.disk import write_json
    from spdcli.measures.slice_graph import graph_text, slice_graph
    from spdcli.measures.viewer_graph import viewer_graph
    from spdcli.runs.loading import load

    loaded = load(run, device)
    console.debug(str(loaded))
    subject, decomposition = loaded.subject, loaded.decomposition
    texts, row = graph_text(subject, which, loaded.begin_token, loaded.seed_or(seed))
    with console.progress() as report:
        whole = slice_graph(
            subject, decomposition, texts, row, top=top, logits=logits, threshold=threshold, report=report
        )
    counts = {name: decomposition.of(name).U.shape[1] for name in decomposition.names}
    blocks = {name: subject.target.matrices[name].block for name in counts}
    target = loaded.recipe.target
    name = scan or Path(getattr(target, "model", None) or target.kind).stem
    write_json(out, viewer_graph(whole, counts, blocks, out.stem, name, __version__))
    size = {"active": whole.active, "nodes": len(whole.nodes), "links": len(whole.links)}
    data = {"schema": "spd.graph/1", "run": run, "prompt": whole.prompt, "tokens": whole.tokens, **size, "saved": out}
    shown = sum(node.kind == "slice" for node in whole.nodes)
    told = f"{whole.prompt!r}: {shown} of {whole.active} active slices, {len(whole.links)} links"
    console.show(data, told, "open it with Neuronpedia's graph validator or circuit-tracer's server")
    console.result(out)

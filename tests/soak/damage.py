"""The kinds of damage that a soak does: each prepares something whole in a folder, and gives a function that alters a
copy of it by a generator and reads what came of it.

A trial raises AssertionError where damage passed for something whole, and whatever the readers raise.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Trial = Callable[[random.Random], None]

# What breaks readers: control bytes, numbers without end, brackets without partners, names that mean something else.
PIECES = [
    *(b"\x00", b"\xff", b"\xc3", b"\x1b[2J", "é\u202e".encode(), b"\r", b"\n"),
    *(b"9" * 400, b"1e999", b"-1", b"nan", b"18446744073709551616", b"0x", b"true", b"null"),
    *(b"[" * 300, b"]", b"{", b"}", b'"', b'"""', b"[[a]]\n", b"[a]\n", b"a.b.c = 1\n", b"=", b",", b"#"),
    *(b"../", b"/dev/zero", b"pytorch_model.bin", b"..", b"~"),
]

KILLED = 3  # times in a trial


def altered(content: bytes, chance: random.Random) -> bytes:
    """`content` with one to three random changes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        start, size = chance.randrange(len(data) + 1), chance.choice((1, 1, 4, 30, 500))
        match chance.randrange(7):
            case 0 if data:
                data[start % len(data)] ^= 1 << chance.randrange(8)
            case 1:
                del data[start : start + size]
            case 2:
                data[start:start] = data[start : start + size]
            case 3:
                data[start:start] = chance.choice(PIECES)
            case 4:
                data[start : start + size] = bytes(len(data[start : start + size]))
            case 5:
                del data[start:]
            case _:
                other = chance.randrange(len(data) + 1)
                data[start:start] = data[other : other + size]
    return bytes(data)


def documents(folder: Path) -> Trial:
    """Recipes, edit scripts and facts files, and options that change a recipe."""
    from spdcli.edits.facts_file import BUILTIN, load_facts
    from spdcli.edits.script import load_script
    from spdcli.recipe.reading import load_recipe, shipped

    recipes = [path.read_bytes() for path in shipped().values()]
    facts = b"\n".join(BUILTIN.read_bytes().splitlines()[:60])
    script = b'[[edit]]\nname = "a"\nslices = ["Q0:1"]\n[[edit.expect]]\nprompt = 1\nmeasure = "ratio"\nat_most = 1\n'
    place = folder / "document.toml"
    options = [b"losses.recon=1", b"slices.C=5", b"target.model=gpt2", b"seed=1", b"slices.matrices=['*']"]

    def trial(chance: random.Random) -> None:
        match chance.randrange(8):
            case 0:
                place.write_bytes(altered(script, chance))
                load_script(place)
            case 1:
                place.write_bytes(altered(facts, chance))
                load_facts(place)
            case 2:
                option = altered(chance.choice(options), chance).decode(errors="surrogateescape")
                load_recipe("induction-quick", [option])
            case _:
                place.write_bytes(altered(chance.choice(recipes), chance))
                load_recipe(place)

    return trial


def tensors(folder: Path) -> Trial:
    """The tensor files of a run: its decomposition, checkpoint and toy, and a patch of its target."""
    import torch
    from small_runs import TOY, save_toy, toy_recipe

    import spdcli
    from spdcli.edits.patches import load_patch, make_patch, save_patch
    from spdcli.edits.suppression import Factors
    from spdcli.engine.fit import start_fit
    from spdcli.recipe.reading import load_recipe
    from spdcli.runs.checkpoints import read_checkpoint
    from spdcli.runs.decomposition import read_decomposition, start_decomposition
    from spdcli.runs.directory import CHECKPOINT, DECOMPOSITION, TOY_WEIGHTS
    from spdcli.runs.settings import optimiser_settings
    from spdcli.runs.subject import load_toy

    (folder / "toy.toml").write_text(TOY)
    toy = save_toy(folder / "toy", toy_recipe(folder=folder))
    recipe = load_recipe(folder / "toy.toml", [f"target.path={toy}", "decompose.steps=3"])
    run = spdcli.decompose(recipe, out=folder / "run")
    subject, home = run.subject, folder / "run"
    weight = subject.target.matrices["Q0"].weight
    edit = {"Q0": Factors(torch.randn(len(weight), 1).double(), torch.randn(1, weight.shape[1]).double())}
    save_patch(home / "patch.safetensors", make_patch(subject.target, edit, ["Q0:0"], {}))

    def checkpoint(path: Path) -> dict[str, Any]:
        decomposition = start_decomposition(recipe.recipe, subject, run.matrices)
        state = start_fit(decomposition, optimiser_settings(recipe.recipe.decompose), 0, torch.device("cpu"))
        read_checkpoint(path, decomposition, state)
        moments = state.optimiser.state_dict()["state"]
        kept = {f"{index} {key}": value for index, values in moments.items() for key, value in values.items()}
        noise = {name: generator.get_state() for name, generator in state.generators.items()}
        return {"step": torch.tensor([state.step, state.seconds])} | kept | noise | decomposition.state_dict()

    def patch(path: Path) -> dict[str, Any]:
        read = load_patch(path)
        about = torch.tensor(list(json.dumps(read.about, sort_keys=True).encode()))
        return {"read": read.edit["Q0"].read, "write": read.edit["Q0"].write, "about": about, **read.restore}

    readers = {
        DECOMPOSITION: lambda path: read_decomposition(path, recipe.recipe, subject).state_dict(),
        CHECKPOINT: checkpoint,
        f"toy/{TOY_WEIGHTS}": lambda path: load_toy(
            path.parent, recipe.recipe.target, torch.device("cpu")
        ).state_dict(),
        "patch.safetensors": patch,
    }
    whole = {name: {key: value.clone() for key, value in read(home / name).items()} for name, read in readers.items()}
    contents = {name: (home / name).read_bytes() for name in readers}

    def trial(chance: random.Random) -> None:
        name = chance.choice(sorted(readers))
        others = [contents[other] for other in sorted(contents) if other != name]
        content = chance.choice(others) if chance.random() < 0.02 else altered(contents[name], chance)
        path = folder / "altered" / Path(name).name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        read = readers[name](path)
        assert read.keys() == whole[name].keys(), name
        assert all(torch.equal(value, whole[name][key]) for key, value in read.items()), name

    return trial


def models(folder: Path) -> Trial:
    """The directory of a language model, one of its files altered, replaced by something else, or taken away."""
    import torch
    from conftest import save_tiny_model

    from spdcli.targets.huggingface import build_target, load_model, load_untrained
    from spdcli.targets.prompts import encode
    from spdcli.targets.quiet import quiet

    with quiet():
        whole = [save_tiny_model(folder / kind, kind) for kind in ("gpt2", "llama")]
    model, outside = folder / "model", folder / "outside"
    outside.write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    (whole[1] / "model.safetensors.index.json").write_text(json.dumps(index))

    def replaced(path: Path, chance: random.Random) -> None:
        content = path.read_bytes()
        path.unlink()
        match chance.randrange(12):
            case 0:
                os.mkfifo(path)
            case 1:
                path.symlink_to(chance.choice(("/dev/zero", "../outside", "nowhere", str(path))))
            case 2:
                path.mkdir()
            case 3:
                pass
            case _:
                path.write_bytes(changed_json(content, chance) or altered(content, chance))

    def trial(chance: random.Random) -> None:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(chance.choice(whole), model)
        replaced(chance.choice(sorted(model.iterdir())), chance)
        if chance.random() < 0.2:
            load_untrained(str(model), "float32", torch.device("meta"))
            return
        language_model = load_model(str(model), "float32")
        batch = encode(language_model.tokenizer, ["Kobe Bryant plays golf"]).batch
        build_target(language_model, False).run(batch.tokens)
        assert outside.read_bytes() == b"", "something was written outside"

    return trial


def changed_json(content: bytes, chance: random.Random) -> bytes | None:
    """JSON with one of its values changed to something that it never is; None for what is no JSON object."""
    try:
        data = json.loads(content)
    except ValueError:
        return None
    if chance.random() < 0.3 or not isinstance(data, dict) or not data:
        return None
    odd = [None, -1, 0, 1, 3, 2**31, 2**63, 1e300, True, "", "../x", [], {}, ["gpt2"], "x" * 9999, [0] * 99, {"a": {}}]
    data[chance.choice(sorted(data))] = chance.choice(odd)
    return json.dumps(data).encode()


def kills(folder: Path) -> Trial:
    """A run of a toy or of a language model whose process is killed at any moment, three times, and resumed until it
    is done: it has to end bit for bit as one that nothing interrupted."""
    from conftest import save_tiny_model
    from small_runs import MODEL, TOY, save_toy, toy_recipe

    from spdcli.runs.directory import CHECKPOINT, DECOMPOSITION, METRICS, RunDirectory
    from spdcli.targets.quiet import quiet

    (folder / "toy.toml").write_text(TOY)
    (folder / "model.toml").write_text(MODEL)
    with quiet():
        model = save_tiny_model(folder / "gpt2", "gpt2")
    targets = {"toy": f"path={save_toy(folder / 'toy', toy_recipe(folder=folder))}", "model": f"model={model}"}

    def command(kind: str, out: Path, *how: str) -> list[object]:
        settings = [f"target.{targets[kind]}", "decompose.steps=60", "decompose.checkpoint_every=5"]
        options = [part for setting in settings for part in ("--set", setting)]
        return ["decompose", folder / f"{kind}.toml", *options, "-q", "--out", out, *how]

    def how_to_go_on(run: Path) -> list[str]:
        return ["--resume"] if RunDirectory(run).has_checkpoint else ["--force"] if run.exists() else []

    def told(run: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in r.items() if key != "seconds"} for r in RunDirectory(run).metrics()]

    said, seconds = folder / "said", {}
    for kind in targets:
        begun = time.monotonic()
        assert code_of(forked(command(kind, folder / f"whole-{kind}"), said)) == 0, said.read_text()
        seconds[kind] = time.monotonic() - begun

    def trial(chance: random.Random) -> None:
        kind, run, left = chance.choice(sorted(targets)), folder / "run", KILLED
        shutil.rmtree(run, ignore_errors=True)
        while left:
            process = forked(command(kind, run, *how_to_go_on(run)), said)
            code = code_of(process, chance.random() * seconds[kind])
            assert code in (0, -signal.SIGKILL), said.read_text()
            if code == 0:  # it was quicker, and the next one begins anew
                shutil.rmtree(run)
            else:
                left -= 1
        assert code_of(forked(command(kind, run, *how_to_go_on(run)), said)) == 0, said.read_text()
        uninterrupted = folder / f"whole-{kind}"
        for name in (DECOMPOSITION, CHECKPOINT):
            assert tensors_of(run / name) == tensors_of(uninterrupted / name), name
        assert told(run) == told(uninterrupted), METRICS
        assert not list(run.rglob("*.part")), "something unfinished is left"

    return trial


def forked(arguments: list[object], said: Path) -> int:
    """Runs `spd` in a process of its own, which begins with everything imported; gives its number. What it says goes
    into a file."""
    from spdcli import cli

    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["spd", *map(str, arguments)]
        cli.main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
        sys.stderr.flush()
    finally:
        os._exit(code)


def code_of(process: int, seconds: float = float("inf")) -> int:
    """The exit code of a forked process once it ends; it is killed after so many `seconds`."""
    end, status = time.monotonic() + seconds, (0, 0)
    while not status[0] and time.monotonic() < end:
        time.sleep(0.005)
        status = os.waitpid(process, os.WNOHANG)
    if not status[0]:
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status[1])


def tensors_of(path: Path) -> dict[str, bytes]:
    """The tensors of a file as bytes."""
    import torch

    from spdcli.files import load_tensors

    tensors, _ = load_tensors(path)
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


KINDS: dict[str, Callable[[Path], Trial]] = {
    "documents": documents,
    "tensors": tensors,
    "models": models,
    "kills": kills,
}

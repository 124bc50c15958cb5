"""Runs whose page is looked at: a small toy, and a tiny GPT-2 with the report on its facts."""

from __future__ import annotations

import pytest
from small_runs import model_recipe, save_toy, toy_recipe

import spdcli
from spdcli.figures.facts import save_report
from spdcli.location.report import ReportSettings
from spdcli.location.tracing import TraceSettings
from spdcli.page.assemble import run_page
from spdcli.page.render import html
from spdcli.paper.table1 import PAPER_ACTIVE
from spdcli.runs.directory import EVAL
from spdcli.runs.results import write_result

KOBE = "Kobe Bryant plays professional basketball"
FACTS = f"""\
[known]
probability = 1e-9
rank = 100000

[[fact]]
category = "sport"
prompt = "{KOBE}"
subject = "Kobe Bryant"

[[fact]]
category = "sport"
prompt = "Tiger Woods plays the sport of golf"
subject = "sport of"

[[fact]]
category = "sport"
prompt = "Woods plays <b> & basketball"

[[related]]
of = "{KOBE}"
kind = "paraphrase"
prompt = "the professional Bryant plays basketball"
"""


@pytest.fixture(scope="package")
def toy_page(tmp_path_factory):
    """The page of a run in a directory whose name has to be escaped."""
    folder = tmp_path_factory.mktemp("toy")
    toy = save_toy(folder / "trained", toy_recipe(folder=folder))
    run = spdcli.decompose(toy_recipe(f"target.path={toy}", folder=folder), folder / "<i>run")
    (folder / "page").mkdir()
    page = run_page(run, folder / "page", paper=PAPER_ACTIVE)
    (folder / "report.html").write_text(html(page), encoding="utf-8")
    return run, page, folder / "report.html"


@pytest.fixture(scope="package")
def language_page(tmp_path_factory, tiny_gpt2_dir):
    folder = tmp_path_factory.mktemp("language")
    settings = ["data.stream='generated'", "data.stream_sequences=8", "data.stream_length=8"]
    run = spdcli.decompose(model_recipe(tiny_gpt2_dir, *settings, folder=folder), folder / "run")
    (folder / "facts.toml").write_text(FACTS)
    told = run.report(
        settings=ReportSettings(TraceSettings(samples=1, window=1), random=1), facts=folder / "facts.toml"
    )
    write_result(run.home, run.decomposition, EVAL, {"metrics": {"recon": 0.125, "stochastic_recon": None}})
    (folder / "page").mkdir()
    page = run_page(run, folder / "page", told, save_report(told, folder / "page"))
    (folder / "report.html").write_text(html(page), encoding="utf-8")
    return run, page, folder / "report.html"

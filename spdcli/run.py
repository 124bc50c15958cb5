"""A decomposition in Python's hands: what the commands do with a run, as methods that print nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spdcli.certification.certificate import Certificate
from spdcli.certification.certify import Certifying, certify
from spdcli.edits.ablation import AblationReport, Masking, ablate
from spdcli.edits.checkpoints import edited_model
from spdcli.edits.choices import OTHERS, TOGETHER, USUAL_OTHERS, USUAL_TOGETHER
from spdcli.edits.counterfact import Record, load_records
from spdcli.edits.edit_reports import SuppressionReport, report_suppression
from spdcli.edits.exam import Exam, open_exam
from spdcli.edits.facts_file import Facts, load_facts
from spdcli.edits.feature_ablation import FeatureAblation, ablate_features
from spdcli.edits.script import load_script
from spdcli.edits.suppression import find_matrix, find_slices, suppression
from spdcli.edits.text_changes import TOKENS, TextToKeep, text_to_keep
from spdcli.edits.zeroing import zeroed_parts
from spdcli.errors import UsageError
from spdcli.explorer.exploration import Exploration
from spdcli.files import checksum, save_tensors
from spdcli.location.locate import PromptSearch, Search, locate
from spdcli.location.report import ReportSettings, RunReport, report_facts
from spdcli.location.tracing import Trace, TraceSettings, trace
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evidence_choices import ADVERSARIES, STARTS, USUAL_ADVERSARY, MaskSearch
from spdcli.measures.feature_evaluation import FeatureEvaluation
from spdcli.measures.harvest import Harvest, harvest
from spdcli.measures.harvest_files import save_harvest
from spdcli.measures.importances import Ids, importances, text_ids
from spdcli.measures.inspection import Inspection, Query, inspect_texts
from spdcli.measures.language_evaluation import LanguageEvaluation
from spdcli.measures.slice_graph import SliceGraph, graph_text, slice_graph
from spdcli.measures.svd import RankCurves, svd_curves
from spdcli.measures.texts import prompt_texts
from spdcli.measures.toy_evaluation import ToyEvaluation
from spdcli.page.assemble import write_page
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.bounds import BOUNDS
from spdcli.runs.directory import TOY, TOY_WEIGHTS, RunDirectory
from spdcli.runs.fingerprint import keep_fingerprint
from spdcli.runs.goodfire import export_run
from spdcli.runs.loading import LoadedRun
from spdcli.runs.opening import opened_run
from spdcli.runs.sharing import push, write_shared
from spdcli.runs.subject import require_tokens
from spdcli.runs.text_data import text_to_read
from spdcli.targets.masking import importance_masks_of, masked_module

BUILTIN_FACTS = "builtin"  # those that come with spd
FactsSource = str | Path | None


class Run(LoadedRun):
    """A target taken apart: `recipe`, `subject` (target and data), `decomposition` (slices and importance functions).

    `directory` is None for a run that is kept in memory. Letters: B sequences, T positions, I d_in, O d_out,
    C slices of a matrix.
    """

    @property
    def model(self) -> nn.Module:
        """The target itself, an ordinary module: hooks of other tools work on it, and its weights never change."""
        return self.subject.target.model

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer; None for the toy."""
        return None if self.subject.prompts is None else self.subject.prompts.tokenizer

    @property
    def matrices(self) -> list[str]:
        """The names of the decomposed matrices, in the order of execution."""
        return self.decomposition.names

    def slices(self, matrix: str) -> tuple[Tensor, Tensor]:
        """`U` `[I, C]` and `V` `[C, O]` of one matrix: slice c reads `x @ U[:, c]` and writes along `V[c]`."""
        own = self.decomposition.of(find_matrix(self.matrices, matrix, "the run decomposes"))
        return own.U.detach(), own.V.detach()

    def tokens(self, text: str) -> Tensor:
        """The token ids `[T]` of a text, fed whole (of the toy a text is such as `3 s 17 4 s`, of a module without a
        tokenizer such as `3 17 4`).

        A language model's begin-of-sequence token comes first where the recipe says so.
        """
        return text_ids(self.subject, text, self.begin_token).to(self.subject.target.device)

    def importances(self, text: str | Ids) -> dict[str, Tensor]:
        """The importance g of every slice, in [0, 1], by matrix: `[T, C]` for a text or ids `[T]`, `[B, T, C]` for
        ids `[B, T]`.

        Gates in the span of the prompts (`importance.basis = "span"`) see a projection of any other text.
        UsageError for a text that is longer than the run's importance attention.
        """
        return importances(self.subject, self.decomposition, text, self.begin_token)

    @contextmanager
    def masked(
        self, masks: Mapping[str, Tensor] | None = None, *, active: bool = False, delta: float = 0.0
    ) -> Iterator[nn.Module]:
        """While open, `run.model` answers with masked slices in the place of its matrices; afterwards it is as before.

        With `active` every decomposed matrix is made of its active slices alone: their masks are their importances on
        the tokens that the model is called with. Or `masks[m]` `[C]`, `[T, C]` or `[B, T, C]` for the matrices m that
        are to be replaced. `delta` multiplies `W - U V`, what no slice holds; with 1, masks of 1 are the target itself.
        """
        if active == (masks is not None):
            raise UsageError("a masked model needs masks, or active=True", "give one of the two")
        if masks is not None and not (isinstance(masks, Mapping) and masks):
            raise UsageError("masks= names no matrix", f"give a dict, as in {{{self.matrices[0]!r}: mask}}")
        if not isinstance(delta, int | float):
            raise UsageError(f"delta={delta!r} is no number", "0 leaves slices alone, 1 is the target with masks of 1")
        target, decomposition = self.subject.target, self.decomposition
        masks_of = importance_masks_of(target, decomposition) if masks is None else lambda batch: masks
        with masked_module(target, decomposition, masks_of, delta):
            yield self.model

    def evaluate(
        self,
        sequences: int | None = None,
        *,
        threshold: float = 0.0,
        seed: int | None = None,
        adversary: str = USUAL_ADVERSARY,
        starts: int = STARTS,
        progress: Report = silent,
    ) -> ToyEvaluation | FeatureEvaluation | LanguageEvaluation:
        """What the decomposition is worth, as `spd eval`: active and unique slices, reconstruction, attention, circuit.

        A toy is measured on `sequences` fresh sequences (8192 if None), a language model on so many of its prompts, or
        of text that nothing was trained on (if None on as many as have a few hundred tokens), a module of your own on
        its data (one draw, where they are drawn); a slice is active where its importance is above `threshold`.
        `adversary` (none, quick or curve) says how hard masks are sought that break it, from so many random `starts`.
        """
        _at_least(2, sequences=2 if sequences is None else sequences)
        _at_least(1, starts=starts)
        sought = MaskSearch(_one_of(ADVERSARIES, adversary), starts)
        seed = self.seed_or(seed)
        return evaluate(self.subject, self.decomposition, sequences, threshold, seed, sought, progress)

    def certify(
        self,
        *against: LoadedRun,
        script: str | Path | None = None,
        bounds: Mapping[str, float] | None = None,
        settings: Certifying | None = None,
        facts: FactsSource = BUILTIN_FACTS,
        progress: Report = silent,
    ) -> Certificate:
        """Everything a sceptic asks, as `spd certify`, held against `bounds`; against those of the recipe if None.

        The slices of `against`, other runs of the same target, should be the same. `script` is an edit script, which
        `facts` are for.
        """
        for name in bounds or ():
            _one_of(BOUNDS, name)
        own = self.recipe.certify.bounds if self.recipe.certify is not None else {}
        read = None if script is None else load_script(Path(script))
        beside = self._facts(facts) if read is not None and read[0].asks_facts else None
        settings = settings or Certifying(seed=self.recipe.seed)
        return certify(self, own if bounds is None else bounds, settings, against, read, beside, progress)

    def inspect(
        self,
        token: str | None = None,
        *,
        prompts: Sequence[int | str] = (),
        matrices: Sequence[str] = ("*",),
        top: int = 20,
        labels: int = 5,
        threshold: float = 0.0,
        places: int | None = None,
        progress: Report = silent,
    ) -> Inspection:
        """The slices that are active at a token (None: everywhere), as `spd inspect`: what they read and promote.

        On all of the run's own prompts, or on `prompts`: some of them by number, or texts, fed whole. Of `matrices`
        (names or patterns) the `top` slices at each place, each with so many `labels`, at the first `places` (None: at
        all). UsageError for a token that is nowhere.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts= is a text", "give a list of texts")
        _at_least(1, top=top)
        query = Query(token, list(matrices), top, labels, threshold, places)
        seed = self.recipe.seed
        return inspect_texts(self.subject, self.decomposition, query, prompts, self.begin_token, seed, progress)

    def harvest(
        self,
        data: str | Path | None = None,
        *,
        field: str = "text",
        tokens: int = 100_000,
        matrices: Sequence[str] = ("*",),
        threshold: float = 0.0,
        progress: Report = silent,
    ) -> Harvest:
        """What every slice does over about so many `tokens` of text, as `spd harvest`; kept in the run's directory.

        `data` is a corpus as in `decompose`, whose rows have their text in `field`; the run's own if None. Of
        `matrices` (names or patterns) a slice is active above `threshold`. UsageError for a run whose gates hold on its
        own prompts alone.
        """
        _at_least(1, tokens=tokens)
        source = None if data is None else str(data)
        text = partial(text_to_read, self.recipe, self.subject, source, field, progress)
        gathered = harvest(self.subject, self.decomposition, text, tokens, matrices, threshold, progress)
        if self.directory is None:
            return gathered
        own = checksum(self.decomposition.state_dict())
        if not save_harvest(self.directory.path, gathered, self.subject.token_text, own):
            progress(Progress("no pyarrow, so no slices.parquet: pip install 'spd-cli[text]'", warning=True))
        return gathered

    def graph(
        self,
        prompt: int | str = 1,
        *,
        top: int = 100,
        logits: int = 5,
        threshold: float = 0.0,
        progress: Report = silent,
    ) -> SliceGraph:
        """A prompt's active slices and how each moves the others and the answer, as `spd graph` writes it.

        `prompt` is one of the run's, by its number from 1 or its text, or another text, fed whole. Of the `top` slices
        of most effect on the `logits` likeliest next tokens. `viewer_graph` makes of it what graph viewers read.
        """
        _at_least(1, top=top, logits=logits)
        texts, row = graph_text(self.subject, prompt, self.begin_token, self.recipe.seed)
        own = (self.subject, self.decomposition, texts, row)
        return slice_graph(*own, top=top, logits=logits, threshold=threshold, report=progress)

    def svd(self, tolerance: float = 1e-3, *, sequences: int = 512, progress: Report = silent) -> RankCurves:
        """How small a model says the same, as `spd svd`: KL (nats) against rank, beside greedy SVD (Figure 2).

        `result` is what each method has left at the last point before its KL first exceeds `tolerance`.
        """
        _at_least(1, sequences=sequences)
        if not tolerance >= 0:
            raise UsageError(f"tolerance={tolerance}: expected nats, 0 or more")
        return svd_curves(
            self.subject,
            self.decomposition,
            tolerance=tolerance,
            sequences=sequences,
            seed=self.recipe.seed,
            report=progress,
        )

    def suppress(self, slices: Sequence[str], *, together: str = USUAL_TOGETHER, strength: float = 1.0) -> nn.Module:
        """A copy of the model whose original weights have lost the slices' directions, as `spd suppress --save`.

        W ← W − Σ (ûᵀ W v̂) û v̂ᵀ over `slices`, addresses such as `layers.0.mlp.up_proj:2` (section 5.2); `together` is
        literal, as written, orthonormal, sequence, or whole: W − Σ u vᵀ, the slices as they stand. Of a language model
        it is a plain transformers model. `strength` is how much of that is taken, 1 all. UsageError for a slice that is
        not there.
        """
        addresses = find_slices(self.decomposition, slices)
        edit = suppression(self.subject.target, self.decomposition, addresses, _one_of(TOGETHER, together), strength)
        return edited_model(self.subject, edit)

    def suppression(
        self,
        slices: Sequence[str],
        *,
        together: str = USUAL_TOGETHER,
        strength: float = 1.0,
        prompts: Sequence[int | str] = (),
        answers: Sequence[str] = (),
        facts: FactsSource = BUILTIN_FACTS,
        counterfact: str | Path | None = None,
        text: str | Path | None = None,
        text_tokens: int = TOKENS,
        progress: Report = silent,
    ) -> SuppressionReport:
        """What `suppress` does to the run's prompts (or `prompts`) and to other facts, as `spd suppress` reports it.

        A prompt is one of the run's by its number, from 1, or a text. `answers` are those of `prompts`, of one or
        several tokens each; without them a prompt's last token is its answer. `facts` are those that come with spd,
        those of a file, or None. `scores` are the efficacy, paraphrase and specificity of papers on editing, on the
        facts, and on the records of `counterfact`, a file in that format. `text`, a file or directory, or "own", is a
        text of which `text_tokens` should stay as they are.
        """
        addresses = find_slices(self.decomposition, slices)
        records = [] if counterfact is None else load_records(Path(counterfact))
        exam = self._exam(prompts, facts, progress, answers, records)
        exam = replace(exam, text=self._text(text, text_tokens, progress))
        form = _one_of(TOGETHER, together)
        return report_suppression(self.subject, self.decomposition, addresses, form, exam, strength, progress)

    def ablate(
        self,
        slices: Sequence[str] = (),
        *,
        matrices: Sequence[str] = (),
        mlps: Sequence[str] = (),
        others: str = USUAL_OTHERS,
        samples: int = 16,
        prompts: Sequence[int | str] = (),
        answers: Sequence[str] = (),
        facts: FactsSource = BUILTIN_FACTS,
        progress: Report = silent,
    ) -> AblationReport | FeatureAblation:
        """What is lost with the mask of `slices` at 0 in the decomposed model, as `spd ablate`, the masks of the others
        `others`: on, importance, or sampled (so many `samples`).

        Or without slices, with whole `matrices` of the target, or `mlps` (layers such as "0", or "all"), at 0. Of a toy
        of sparse features it is told what every feature loses.
        """
        addresses = find_slices(self.decomposition, slices)
        zeroed = zeroed_parts(self.subject.target, matrices, mlps)
        if not (addresses or zeroed):
            raise UsageError("nothing to ablate", "give slices, matrices or mlps")
        masking = Masking(_one_of(OTHERS, others), samples, self.recipe.seed)
        if self.subject.feature_toy is not None:
            return ablate_features(self.subject, self.decomposition, addresses, zeroed, masking)
        exam = self._exam(prompts, facts, progress, answers)
        return ablate(self.subject, self.decomposition, exam, addresses, zeroed, masking, progress)

    def locate(
        self,
        prompt: int | str | None = None,
        token: str | None = None,
        *,
        search: Search | None = None,
        facts: FactsSource = BUILTIN_FACTS,
        text: str | Path | None = None,
        text_tokens: int = TOKENS,
        progress: Report = silent,
    ) -> list[PromptSearch]:
        """The slices that carry an answer, as `spd locate`: each that is active in the prompt is suppressed.

        `prompt` is one of the run's, by its number from 1 or its text, or another text; None is each of the run's.
        `token` is the answer to look at, the prompt's last one if not given. Of `text`, a file or directory, or "own",
        `text_tokens` should stay as they are. One entry a prompt.
        """
        beside, seed = self._facts(facts), self.recipe.seed
        which = [] if prompt is None else [prompt]
        kept = self._text(text, text_tokens, progress)
        return locate(self.subject, self.decomposition, which, token, beside, search, seed, kept, progress)

    def trace(
        self,
        subjects: Sequence[str] = (),
        *,
        prompts: Sequence[int | str] = (),
        settings: TraceSettings | None = None,
        progress: Report = silent,
    ) -> list[Trace]:
        """Causal tracing (Figures 7 and 8), as `spd trace`, of the run's prompts or of `prompts` (numbers or texts).

        `subjects` are the words to corrupt; those that the shipped facts name need not be told.
        """
        require_tokens(self.subject)
        if self.subject.prompts is None:
            raise UsageError("causal tracing needs a language model", "spd eval explains the toy")
        own = self.subject.prompts.texts
        texts = prompt_texts(own, prompts) or own
        settings = settings or TraceSettings(seed=self.recipe.seed)
        return trace(self.subject.target, self.tokenizer, texts, subjects, settings, self.begin_token, progress)

    def report(
        self,
        subjects: Sequence[str] = (),
        *,
        settings: ReportSettings | None = None,
        facts: str | Path = BUILTIN_FACTS,
        text: str | Path | None = None,
        text_tokens: int = TOKENS,
        progress: Report = silent,
    ) -> RunReport:
        """Where the run's facts are, as `spd report`: every way to cut them, beside baselines and controls.

        `text`, a file or directory, or "own", is a text of which `text_tokens` should stay as they are.
        """
        beside = self._facts(facts) or load_facts()
        recipe, seed = self.recipe, self.recipe.seed
        settings = settings or ReportSettings(TraceSettings(samples=3, seed=seed), seed=seed)
        return report_facts(
            self.subject,
            self.decomposition,
            recipe.data,
            recipe.slices.ridge,
            beside,
            subjects,
            settings,
            self._text(text, text_tokens, progress),
            progress,
        )

    def explore(self, threshold: float = 0.0, labels: int = 6) -> Exploration:
        """What `spd explore` shows, without a screen: `prompt(1)` or `typed(text)` is a text's map of importance,
        `slices` those of one of its cells, `next_tokens` what follows without some of them."""
        return Exploration(self, threshold, labels)

    def save_page(self, folder: str | Path, facts: RunReport | None = None, *, progress: Report = silent) -> Path:
        """Write the run's page, as `spd report`, with its figures into `folder`: one file of HTML that needs nothing
        else. `facts` is what `report` gives, and without it the page says nothing of facts."""
        return write_page(self, Path(folder), facts, report=progress)[0]

    def save(self, path: str | Path, *, force: bool = False) -> RunDirectory:
        """Write a run that was kept in memory to a directory, for `load` and for the commands; it cannot go on there.

        UsageError for a directory that holds another run, unless `force` replaces it.
        """
        directory = RunDirectory(Path(path))
        with opened_run(directory, self.recipe, force):
            if self.subject.trained_toy is not None:
                save_tensors(directory / TOY / TOY_WEIGHTS, self.subject.trained_toy.state_dict())
            keep_fingerprint(directory.path, self.subject.target)
            directory.save_decomposition(self.decomposition)
        return directory

    def save_pretrained(self, path: str | Path, *, force: bool = False) -> None:
        """Write the run for others, with a model card: a directory that `load` and `from_pretrained` read."""
        write_shared(self, Path(path), force)

    def export(self, path: str | Path, *, force: bool = False) -> None:
        """Write the run as a checkpoint of goodfire-ai/spd, as `spd export`: torch.save's form, or `.safetensors`.

        UsageError for importance functions that its code does not have, and for a file that is there without `force`.
        """
        export_run(self, Path(path), force)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the run with a model card to OWNER/NAME on the Hugging Face hub; gives its address."""
        return push(self, repository, private)

    def _exam(
        self,
        prompts: Sequence[int | str],
        facts: FactsSource,
        report: Report,
        answers: Sequence[str] = (),
        records: Sequence[Record] = (),
    ) -> Exam:
        if answers and len(answers) != len(prompts):
            raise UsageError(f"{len(answers)} answers of {len(prompts)} prompts", "give one a prompt, or none")
        beside, seed = self._facts(facts), self.recipe.seed
        return open_exam(self.subject, prompts, beside, answers=answers, records=records, seed=seed, report=report)

    def _text(self, text: str | Path | None, tokens: int, report: Report) -> TextToKeep | None:
        return None if text is None else text_to_keep(self.recipe, self.subject, str(text), tokens, report)

    def _facts(self, facts: FactsSource) -> Facts | None:
        """The facts that are meant; the toy knows none of those that come with spd."""
        if facts is None or (facts == BUILTIN_FACTS and self.subject.prompts is None):
            return None
        return load_facts(None if facts == BUILTIN_FACTS else Path(facts))


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise UsageError(f"{name}={number}: expected at least {least}")


def _one_of(table: Mapping[str, object], name: str) -> str:
    if name not in table:
        raise UsageError(f"{name!r}: expected one of {', '.join(table)}")
    return name

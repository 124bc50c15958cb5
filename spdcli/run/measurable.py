"""The methods of a run that change nothing: what it is worth, and what its slices do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from spdcli.certification.certificate import Certificate
from spdcli.certification.certify import Certifying, certify
from spdcli.edits.script import load_script
from spdcli.errors import UsageError
from spdcli.files import checksum
from spdcli.measures.evaluation import evaluate
from spdcli.measures.evidence_choices import ADVERSARIES, STARTS, USUAL_ADVERSARY, MaskSearch
from spdcli.measures.feature_evaluation import FeatureEvaluation
from spdcli.measures.harvest import Harvest, harvest
from spdcli.measures.harvest_files import save_harvest
from spdcli.measures.inspection import Inspection, Query, inspect_texts
from spdcli.measures.language_evaluation import LanguageEvaluation
from spdcli.measures.slice_graph import SliceGraph, graph_text, slice_graph
from spdcli.measures.svd import RankCurves, svd_curves
from spdcli.measures.toy_evaluation import ToyEvaluation
from spdcli.progress import Progress, Report, silent
from spdcli.recipe.bounds import BOUNDS
from spdcli.run.arguments import BUILTIN_FACTS, FactsSource, facts_beside, require_at_least, require_one_of
from spdcli.runs.loading import LoadedRun
from spdcli.runs.text_data import text_to_read


class MeasurableRun(LoadedRun):
    """A run that can be measured: what the decomposition is worth, and what its slices do where."""

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
        require_at_least(2, sequences=2 if sequences is None else sequences)
        require_at_least(1, starts=starts)
        sought = MaskSearch(require_one_of(ADVERSARIES, adversary), starts)
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
            require_one_of(BOUNDS, name)
        own = self.recipe.certify.bounds if self.recipe.certify is not None else {}
        read = None if script is None else load_script(Path(script))
        beside = facts_beside(self.subject, facts) if read is not None and read[0].asks_facts else None
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
        require_at_least(1, top=top)
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
        require_at_least(1, tokens=tokens)
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
        require_at_least(1, top=top, logits=logits)
        texts, row = graph_text(self.subject, prompt, self.begin_token, self.recipe.seed)
        own = (self.subject, self.decomposition, texts, row)
        return slice_graph(*own, top=top, logits=logits, threshold=threshold, report=progress)

    def svd(self, tolerance: float = 1e-3, *, sequences: int = 512, progress: Report = silent) -> RankCurves:
        """How small a model says the same, as `spd svd`: KL (nats) against rank, beside greedy SVD (Figure 2).

        `result` is what each method has left at the last point before its KL first exceeds `tolerance`.
        """
        require_at_least(1, sequences=sequences)
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

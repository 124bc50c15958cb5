"""The methods of a run that change its model, and those that find out where to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from spdcli.edits.ablation import AblationReport, Masking, ablate
from spdcli.edits.checkpoints import edited_model
from spdcli.edits.choices import OTHERS, TOGETHER, USUAL_OTHERS, USUAL_TOGETHER
from spdcli.edits.counterfact import Record, load_records
from spdcli.edits.edit_reports import SuppressionReport, report_suppression
from spdcli.edits.exam import Exam, open_exam
from spdcli.edits.facts_file import load_facts
from spdcli.edits.feature_ablation import FeatureAblation, ablate_features
from spdcli.edits.suppression import find_slices, suppression
from spdcli.edits.text_changes import TOKENS, TextToKeep, text_to_keep
from spdcli.edits.zeroing import zeroed_parts
from spdcli.errors import UsageError
from spdcli.location.locate import PromptSearch, Search, locate
from spdcli.location.report import ReportSettings, RunReport, report_facts
from spdcli.location.tracing import Trace, TraceSettings, trace
from spdcli.measures.texts import prompt_texts
from spdcli.progress import Report, silent
from spdcli.run.arguments import BUILTIN_FACTS, FactsSource, facts_beside, require_one_of
from spdcli.runs.loading import LoadedRun
from spdcli.runs.subject import require_tokens


class EditableRun(LoadedRun):
    """A run whose slices can be cut out: suppression and ablation, where a fact is, and what all of that loses."""

    def suppress(self, slices: Sequence[str], *, together: str = USUAL_TOGETHER, strength: float = 1.0) -> nn.Module:
        """A copy of the model whose original weights have lost the slices' directions, as `spd suppress --save`.

        W ← W − Σ (ûᵀ W v̂) û v̂ᵀ over `slices`, addresses such as `layers.0.mlp.up_proj:2` (section 5.2); `together` is
        literal, as written, orthonormal, sequence, or whole: W − Σ u vᵀ, the slices as they stand. Of a language model
        it is a plain transformers model. `strength` is how much of that is taken, 1 all. UsageError for a slice that is
        not there.
        """
        addresses = find_slices(self.decomposition, slices)
        edit = suppression(
            self.subject.target, self.decomposition, addresses, require_one_of(TOGETHER, together), strength
        )
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
        form = require_one_of(TOGETHER, together)
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
        masking = Masking(require_one_of(OTHERS, others), samples, self.recipe.seed)
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
        beside, seed = facts_beside(self.subject, facts), self.recipe.seed
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
        return trace(
            self.subject.target, self.subject.prompts.tokenizer, texts, subjects, settings, self.begin_token, progress
        )

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
        beside = facts_beside(self.subject, facts) or load_facts()
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
        beside, seed = facts_beside(self.subject, facts), self.recipe.seed
        return open_exam(self.subject, prompts, beside, answers=answers, records=records, seed=seed, report=report)

    def _text(self, text: str | Path | None, tokens: int, report: Report) -> TextToKeep | None:
        return None if text is None else text_to_keep(self.recipe, self.subject, str(text), tokens, report)

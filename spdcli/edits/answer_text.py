"""Prompts and their answers as text: an answer that is given beside its prompt, and prompts that end in a blank.

Knows neither torch nor transformers; `edits/prompts_and_answers.py` makes tokens of them.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

from spdcli.progress import Progress, Report


def with_answer(prompt: str, answer: str | None) -> str:
    """The prompt and its answer as one text; a prompt without one is returned as it is, for it ends in its answer.

    A blank goes between the two unless one is there, or the answer is written without (Chinese, Japanese, Korean).

    >>> with_answer("Kobe Bryant played for the", "Los Angeles Lakers")
    'Kobe Bryant played for the Los Angeles Lakers'
    >>> with_answer("法国的首都是", "巴黎"), with_answer("Tiger Woods plays golf", None)
    ('法国的首都是巴黎', 'Tiger Woods plays golf')
    """
    if answer is None:
        return prompt
    apart = prompt[-1:].isspace() or answer[:1].isspace() or unicodedata.east_asian_width(answer[:1] or " ") in "WF"
    return prompt + answer if apart else f"{prompt} {answer}"


def warn_of_blanks(prompts: Sequence[str], answers: Sequence[str | None], report: Report) -> None:
    """Say so of every prompt that ends in a blank, which most tokenizers take for its answer.

    A prompt whose answer stands beside it is tokenised together with it, so that its blank does no harm; `answers` are
    one a prompt, or none.
    """
    for prompt, answer in itertools.zip_longest(prompts, answers):
        if answer is None and prompt[-1:].isspace():
            text = f"the prompt {prompt!r} ends in a blank, which is now its answer; leave it out: {prompt.rstrip()!r}"
            report(Progress(text, warning=True))

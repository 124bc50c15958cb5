"""Keeps transformers' progress bars and warnings off the terminal while it loads something, and its errors short."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

from transformers.utils import logging

from spdcli.errors import SpdError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, transformers writes nothing to stderr; errors are still raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of a GGUF conversion obeys no setting, so stderr itself is held back.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def silent_panics() -> Iterator[None]:
    """Within it, what a library written in Rust says to the process's own stderr before it raises is not heard."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed already
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def loading(failure: str, hint: str | None = None) -> Iterator[None]:
    """Within it transformers is quiet, and all that it may come to is an SpdError: `failure`, then the reason.

    A damaged file fails in as many ways as there are places to damage; tokenizers panics, past every `Exception`.
    """
    try:
        with quiet(), silent_panics():
            yield
    except (SpdError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise SpdError(f"{failure}: {reason}", hint) from error

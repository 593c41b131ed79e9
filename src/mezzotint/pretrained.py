"""Reading models of transformers from a folder or the Hugging Face hub, quietly and with one clear sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mezzotint.errors import MezzotintError

T = TypeVar("T")


def transformers_for(what: str) -> Any:
    """The package transformers. Raises `MezzotintError` where it is missing, of what needs it."""
    try:
        import transformers
    except ImportError:
        raise MezzotintError(
            f"{what} needs the package transformers; install it with: pip install 'mezzotint[eval]'"
        ) from None
    return transformers


def from_hub(what: str, source: str, read: Callable[[bool], T], example: str, then: str) -> T:
    """read(local): from the folder or the hub's cache; only where that fails, from the network, which waits long.

    Raises `MezzotintError` where neither works: that no `what` could be read from `source`, how to download `example`,
    and what to do `then`.
    """
    try:
        with quiet():
            try:
                return read(True)
            except Exception:
                if Path(source).is_dir():
                    raise
                return read(False)
    except Exception as error:  # OSError, ValueError, SafetensorError, the hub's own, …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "folder" if Path(source).is_dir() else "folder or hub model"
        raise MezzotintError(
            f"no {what} could be read from the {where} {source!r} ({reason}); where there is a network, run "
            f"'hf download {example} --local-dir FOLDER'{then}"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and the hub log what they then raise, and draw progress bars over files."""
    from transformers.utils import logging as log

    hub = logging.getLogger("huggingface_hub")
    level, hub_level, bars = log.get_verbosity(), hub.level, log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            log.enable_progress_bar()

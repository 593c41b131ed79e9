"""Models of transformers and diffusers in folders or on the hub, read quietly and with one clear sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mezzotint.errors import MezzotintError
from mezzotint.files import parse_json

T = TypeVar("T")

WEIGHTS = "diffusion_pytorch_model"
#: for transformers' Auto classes: no code beside a model is imported; unsaid, they would ask the user in between
NO_CODE: dict[str, Any] = {"trust_remote_code": False}

#: of a model's configuration, what changes its numbers and is not seen in its weights; all of it would change with
#: transformers' version
NOT_IN_WEIGHTS = ("hidden_act", "num_attention_heads", "layer_norm_eps")


def not_in_weights(config: Any) -> dict[str, Any]:
    """What tells apart models of transformers of the same weights, by its key in `config` or in a part of it."""

    def found(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        parts = (found(value, f"{prefix}{key}.") for key, value in values.items() if isinstance(value, dict))
        own = {prefix + key: values[key] for key in NOT_IN_WEIGHTS if key in values}
        return own | {key: value for part in parts for key, value in part.items()}

    return dict(sorted(found(config.to_dict()).items()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `MezzotintError` where it is missing or damaged."""
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        raise MezzotintError(f"{path} is missing or no JSON; download the whole folder again") from None
    if not isinstance(values, dict):
        raise MezzotintError(f"{path} is not a JSON object; download the whole folder again")
    return values


def weights_file(folder: Path) -> Path | None:
    """The weights of a model of diffusers in one file: safetensors, else .bin, else the only variant, such as fp16."""
    for middle in ("", ".*"):
        for suffix in ("safetensors", "bin"):
            found = [file for file in folder.glob(f"{WEIGHTS}{middle}.{suffix}") if file.is_file()]
            if len(found) == 1:
                return found[0]
    return None


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

"""The Hugging Face hub: models by name, where the machine can reach it or has them cached."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mezzotint.errors import MezzotintError


def is_name(source: str) -> bool:
    """Whether `source`, which is no path on this machine, may be a hub model: OWNER/NAME, OWNER being no folder."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not Path(source).parent.is_dir()


def snapshot(name: str, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The folder of a hub model's files that match `allow` and not `ignore`, from the cache or downloaded.

    Raises `MezzotintError` where they cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MezzotintError(
            f"{name} is not a path here, and asking the Hugging Face hub needs the package huggingface_hub; install "
            "it with: pip install 'mezzotint[latent]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(allow), ignore_patterns=list(ignore)))
    except Exception as error:  # no network, no such model, no permission: classes of their own, on several bases
        raise MezzotintError(
            f"{name} is not a path here, and the Hugging Face hub did not give it ({type(error).__name__}); where it "
            f"can be reached, run 'hf download {name} --local-dir FOLDER', and give that folder"
        ) from None

"""Frozen text encoders of transformers: captions to features, each computed once and kept.

    $MEZZOTINT_CACHE/captions/t5-1a2b3c4d-bf16.sqlite3      else ~/.cache/mezzotint/captions/…

A database for each encoder and precision, with a row for each caption: a digest of its tokens, their features, and a
checksum. Several processes may read and write it at once; a row that is damaged is made anew.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mezzotint.conditions.text import Text
from mezzotint.errors import MezzotintError
from mezzotint.files import cache_folder, tensors_digest
from mezzotint.pretrained import NO_CODE, from_hub, transformers_for
from mezzotint.store import Store

Tokens = tuple[int, ...]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: of a model's configuration, what changes nothing that it computes in a given precision
IDLE_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class TextEncoder:
    """A pretrained text encoder, frozen: T5 and its relatives (the encoder alone), CLIP's text model, BERT and its.

    path: a folder, or a name on the Hugging Face hub. max_tokens: of a caption, special tokens included; what follows
    is cut off, and so is what the model cannot read (CLIP: after 77). precision: of weights and features. cache: folder
    of the databases.

    width: of a token's features. digest: 8 hexadecimal digits over weights and configuration, by which features are
    kept. Raises `MezzotintError` where transformers is missing, there is no such model or it lacks weights, and for
    `max_tokens` without room for a word.
    """

    def __init__(
        self,
        path: str,
        *,
        max_tokens: int = 128,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise MezzotintError(f"precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
        self._tokenizer, network = _pretrained(path)
        config = network.config
        positions = getattr(config, "max_position_embeddings", None) or max_tokens
        self.max_tokens = min(max_tokens, positions, self._tokenizer.model_max_length)
        special = self._tokenizer.num_special_tokens_to_add()
        if max_tokens <= special:
            raise MezzotintError(f"max_tokens {max_tokens} has no room beside {special} special tokens; raise it")
        self.width: int = config.hidden_size
        self.device = torch.device(device)
        self._dtype = PRECISIONS[precision]
        self._network = network.to(self._dtype).requires_grad_(False).eval()
        settings = {key: value for key, value in config.to_dict().items() if key not in IDLE_SETTINGS}
        self.digest = tensors_digest(network.state_dict(), sorted(settings.items()))
        self._network.to(device)
        folder = cache_folder() / "captions" if cache is None else Path(cache).expanduser()
        name = f"{config.model_type}-{self.digest}-{precision}.sqlite3"
        self._kept = Store(folder / name, "the captions' features")

    def encode(self, captions: Sequence[str], *, batch_size: int = 64, cached: bool = True) -> Text:
        """The last hidden states of B captions' tokens, (B, T, width) on `device`, zero where there is no token.

        T is the number of the longest caption's tokens; every caption has at least one. batch_size: captions at a time
        through the network. cached: False neither reads the cache nor adds to it, for prompts. Raises `MezzotintError`
        for no captions, and for features that are not finite.
        """
        if not captions:
            raise MezzotintError("there are no captions to encode; give at least one, which may be empty")
        asked = self._tokens(captions)
        wanted = sorted(set(asked), key=lambda tokens: (len(tokens), tokens), reverse=True)
        features = self._known(wanted) if cached else {}
        missing = [tokens for tokens in wanted if tokens not in features]
        for start in range(0, len(missing), batch_size):
            made = self._computed(missing[start : start + batch_size])
            if cached:
                self._kept.write({_key(tokens): _bytes(feature) for tokens, feature in made.items()})
            features |= made
        rows = [features[tokens] for tokens in asked]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        return Text(pad_sequence(rows, batch_first=True), mask).to(self.device)

    def _tokens(self, captions: Sequence[str]) -> list[Tokens]:
        """Each caption's token numbers, at least one; half of a character (a lone surrogate) counts as a "?"."""
        readable = [caption.encode(errors="replace").decode() for caption in captions]
        found = self._tokenizer(readable, truncation=True, max_length=self.max_tokens)["input_ids"]
        return [tuple(tokens) or (self._special("bos", "cls", "eos", "pad"),) for tokens in found]

    def _special(self, *names: str) -> int:
        """The number of the first of these special tokens that there is; 0 without any."""
        numbers = (getattr(self._tokenizer, f"{name}_token_id", None) for name in names)
        return next((number for number in numbers if number is not None), 0)

    def _known(self, wanted: Iterable[Tokens]) -> dict[Tokens, Tensor]:
        """What the cache has, whole."""
        keys = {_key(tokens): tokens for tokens in wanted}
        known = {}
        for key, data in self._kept.read(list(keys)).items():
            tokens = keys[key]
            if len(data) == len(tokens) * self.width * self._dtype.itemsize:
                known[tokens] = torch.frombuffer(bytearray(data), dtype=self._dtype).view(len(tokens), self.width)
        return known

    @torch.no_grad()
    def _computed(self, some: Sequence[Tokens]) -> dict[Tokens, Tensor]:
        """The features (T, width) of each, on the CPU, from the network at once."""
        numbers = [torch.tensor(tokens) for tokens in some]
        ids = pad_sequence(numbers, batch_first=True, padding_value=self._special("pad"))
        mask = pad_sequence([torch.ones_like(row) for row in numbers], batch_first=True)
        output = self._network(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        hidden = output.last_hidden_state.cpu()
        if not hidden[mask.bool()].isfinite().all():
            raise MezzotintError("the text encoder gave features that are NaN or infinite; look at its weights")
        return {tokens: row[: len(tokens)] for tokens, row in zip(some, hidden, strict=True)}


def _key(tokens: Tokens) -> bytes:
    return hashlib.sha256(array("q", tokens).tobytes()).digest()


def _bytes(feature: Tensor) -> bytes:
    return feature.contiguous().view(torch.uint8).numpy().tobytes()


# ---- Reading models --------------------------------------------------------------------------------------------------


def _pretrained(path: str) -> tuple[Any, Any]:
    """The tokenizer and the network of a folder or hub name."""
    transformers = transformers_for("a frozen text encoder")
    source = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path

    def read(local: bool) -> tuple[Any, Any, Any]:
        config = transformers.AutoConfig.from_pretrained(source, **NO_CODE, local_files_only=local)
        if config.model_type in ("clip", "clip_text_model"):
            kind: Any = transformers.CLIPTextModel
        elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            kind = transformers.AutoModelForTextEncoding
        else:
            kind = transformers.AutoModel
        network, info = kind.from_pretrained(source, output_loading_info=True, local_files_only=local)
        return transformers.AutoTokenizer.from_pretrained(source, **NO_CODE, local_files_only=local), network, info

    tokenizer, network, info = from_hub(
        "text encoder", source, read, "google/flan-t5-base", " or take another model, and name that folder"
    )
    # What sits on top of the last hidden states is not used.
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise MezzotintError(
            f"the text encoder {path} lacks {len(missing)} of its weights ({', '.join(missing[:3])}, …); download it "
            "again"
        )
    return tokenizer, network.get_encoder() if network.config.is_encoder_decoder else network

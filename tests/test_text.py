"""Captions: their bytes, their way into DiT and DiffuSSM, and frozen encoders against transformers itself."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_diffussm import recurrence, stir
from torch import Tensor, nn

from mezzotint.backbones import DiffuSSM, DiT
from mezzotint.backbones.diffussm import Block, CrossAttentionBlock, ScanOrder
from mezzotint.backbones.layers import Attention, CrossAttention, TransformerBlock, sinusoids
from mezzotint.backbones.s4d import S4D
from mezzotint.backbones.text import (
    HASH_BASE,
    HASH_PRIME,
    NGRAM_ROWS,
    NGRAMS,
    ByteEncoder,
    TextEmbedding,
    head_count,
    ngram_rows,
    pooled,
)
from mezzotint.conditions.text import Bytes, Text, byte_tokens, join
from mezzotint.errors import MezzotintError

DESIGNS = [
    *((DiT, design) for design in ("adaln-zero", "adaln", "cross-attention", "in-context")),
    *((DiffuSSM, design) for design in ("adaln-zero", "cross-attention", "in-context")),
]
WORDS = ("a red heart", "", "Größe 10 🚲")
FEATURES = 6


def network(kind: Any, conditioning: str, text_features: int | None = FEATURES, **changes: Any) -> Any:
    """A tiny network in float64 without a weight of zero."""
    own: dict[str, Any] = (
        {"patch_size": 2, "heads": 2} if kind is DiT else {"state": 4, "scan": ("row", "column-snake")}
    )
    sizes = {"input_size": 4, "in_channels": 2, "out_channels": 4, "width": 16, "depth": 2}
    torch.manual_seed(0)
    model = kind(**own | sizes | {"conditioning": conditioning, "text_features": text_features} | changes).double()
    stir(model)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.arange(32.0 * batch, dtype=torch.float64).cos().view(batch, 2, 4, 4)
    return x, torch.linspace(3, 700, batch, dtype=torch.float64)


def captions(text_features: int = FEATURES) -> Text:
    """Three captions, of 3, 1 and 2 tokens of features, or `WORDS` as bytes."""
    if not text_features:
        return byte_tokens(WORDS, 20)
    features = torch.randn(3, 3, text_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(3) < torch.tensor([[3], [1], [2]])
    return Text(features * mask.unsqueeze(-1), mask)


def with_litter(y: Text, more: int) -> Text:
    """`y` with more padding, in which all sorts of numbers lie."""
    y = y.padded(y.mask.shape[1] + more)
    mask = y.mask if y.tokens.ndim == 2 else y.mask.unsqueeze(-1)
    return Text(torch.where(mask, y.tokens, torch.full_like(y.tokens, 9)), y.mask)


# ------------------------------------------------------------------------------------------------------------ bytes


def test_byte_tokens() -> None:
    y = byte_tokens(WORDS, 12)
    for row, mask, caption in zip(y.tokens, y.mask, WORDS, strict=True):
        expected = [1, *(2 + byte for byte in caption.encode())][:12]
        assert row.tolist() == expected + [0] * (12 - len(expected))
        assert mask.tolist() == [True] * len(expected) + [False] * (12 - len(expected))
    assert byte_tokens(["", ""], 3).mask.tolist() == [[True, False, False]] * 2
    assert byte_tokens(["half a \ud83d"], 20).tokens[0, 8] == 2 + ord("?")
    assert len(byte_tokens([], 4)) == 0


@pytest.mark.parametrize(
    ("captions", "length"), [((), 16), (("",), 16), (("a" * 15,), 16), (("b", "a" * 16), 32), (("a" * 90,), 40)]
)
def test_bytes_are_padded_to_a_step(captions: tuple[str, ...], length: int) -> None:
    """A beginning and the bytes of the longest, in steps of 16, and never more than max_tokens."""
    y = Bytes(40).encode(captions)
    assert y.tokens.shape == (len(captions), length)
    assert torch.equal(y.tokens, byte_tokens(captions, length).tokens)


def test_joined_and_cut() -> None:
    y = join(byte_tokens(["ab"], 3), byte_tokens(["abcd", ""], 5))
    assert y.tokens.tolist() == byte_tokens(["ab", "abcd", ""], 5).tokens.tolist()
    assert torch.equal(y[1:].mask, y.mask[torch.tensor([1, 2])])
    assert captions().padded(5).tokens.shape == (3, 5, FEATURES)


def test_sinusoids_formula() -> None:
    position = torch.arange(7, dtype=torch.float64)
    for i in range(4):
        angle = position / 10000 ** (i / 4)
        torch.testing.assert_close(sinusoids(position, 8)[:, [i, 4 + i]], torch.stack([angle.sin(), angle.cos()], 1))


def test_transformer_block_equals_torch() -> None:
    """With padding, on the tokens that are there."""
    reference = nn.TransformerEncoderLayer(
        16, 2, 64, activation=lambda x: F.gelu(x, approximate="tanh"), layer_norm_eps=1e-6, batch_first=True,
        norm_first=True, dropout=0,
    )  # fmt: skip
    block = TransformerBlock(16, 2)
    names = {
        "norm1": "norm1", "norm2": "norm2", "linear1": "mlp.fc1", "linear2": "mlp.fc2",
        "self_attn.out_proj": "attn.proj", "self_attn.in_proj_": "attn.qkv.",
    }  # fmt: skip
    state = {}
    for name, value in reference.state_dict().items():
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        state[name.replace(old, new)] = value
    block.load_state_dict(state)
    stir(block)
    for name, value in reference.named_parameters():
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        value.data = block.get_parameter(name.replace(old, new)).data
    x, mask = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0)), captions().mask
    got, expected = block.double()(x.double(), mask), reference.double()(x.double(), src_key_padding_mask=~mask)
    torch.testing.assert_close(got[mask], expected[mask])


def test_masked_attention_equals_torch() -> None:
    generator, mask = torch.Generator().manual_seed(0), captions().mask
    x, c = (torch.randn(3, n, 16, generator=generator) for n in (5, 3))
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    to_itself, across = Attention(16, 4), CrossAttention(16, 4)
    reference.in_proj_weight.data = to_itself.qkv.weight.data
    reference.in_proj_bias.data = to_itself.qkv.bias.data
    reference.out_proj.load_state_dict(to_itself.proj.state_dict())
    torch.testing.assert_close(to_itself(c, mask), reference(c, c, c, key_padding_mask=~mask)[0])
    reference.in_proj_weight.data = torch.cat([across.q.weight.data, across.kv.weight.data])
    reference.in_proj_bias.data = torch.cat([across.q.bias.data, across.kv.bias.data])
    reference.out_proj.load_state_dict(across.proj.state_dict())
    torch.testing.assert_close(across(x, c, mask), reference(x, c, c, key_padding_mask=~mask)[0])


def test_byte_encoder_reads_order_and_ignores_padding() -> None:
    encoder = ByteEncoder(16, 2).double()
    stir(encoder)
    y = byte_tokens(WORDS, 20)
    short = byte_tokens(WORDS[:1], 12)
    torch.testing.assert_close(encoder(y.tokens, y.mask)[:1, :12], encoder(short.tokens, short.mask))
    ab, ba = (byte_tokens([word], 3) for word in ("ab", "ba"))
    assert not torch.allclose(
        pooled(encoder(ab.tokens, ab.mask), ab.mask), pooled(encoder(ba.tokens, ba.mask), ba.mask)
    )


def test_pooled() -> None:
    y = captions()
    expected = [row[mask].mean(0) for row, mask in zip(y.tokens, y.mask, strict=True)]
    torch.testing.assert_close(pooled(with_litter(y, 2).tokens, with_litter(y, 2).mask), torch.stack(expected))


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (64, 2), (100, 2), (384, 12), (1152, 36), (36, 1)])
def test_heads(width: int, heads: int) -> None:
    assert head_count(width) == heads


def test_text_starts_at_unit_scale() -> None:
    torch.manual_seed(0)
    for text_features in (0, 768):
        model = DiT(input_size=4, patch_size=2, in_channels=2, width=64, depth=1, heads=2, text_features=text_features)
        y = captions(text_features)
        assert model.y_embedder is not None
        tokens, mask = model.y_embedder(Text(y.tokens.to(torch.get_default_dtype()), y.mask) if text_features else y)
        assert 0.5 < tokens[mask].std() < 2
        for name, parameter in model.y_embedder.named_parameters():
            assert parameter.any() == ("bias" not in name), name


# --------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("text_features", [0, FEATURES])
@pytest.mark.parametrize(("kind", "conditioning"), DESIGNS)
def test_captions_reach_the_output_and_padding_does_not(kind: Any, conditioning: str, text_features: int) -> None:
    model, (x, t), y = network(kind, conditioning, text_features), inputs(), captions(text_features)
    output = model(x, t, y)
    assert output.shape == (3, 4, 4, 4)
    torch.testing.assert_close(model(x, t, with_litter(y, 3)), output)
    torch.testing.assert_close(model(x[2:], t[2:], y[2:]), output[2:])
    other = model(x, t, Text(y.tokens[torch.tensor([0, 2, 2])], y.mask[torch.tensor([0, 2, 2])]))
    torch.testing.assert_close(other[[0, 2]], output[[0, 2]])
    assert not torch.allclose(other[1], output[1])
    assert not torch.allclose(model(x, t + 1, y), output)


@pytest.mark.parametrize("kind", [DiT, DiffuSSM])
def test_pooled_captions_are_as_a_class(kind: Any) -> None:
    """With adaptive normalisation, a caption is the vector that a label table holds: the mean of projected features."""
    model, (x, t), y = network(kind, "adaln-zero"), inputs(), captions()
    classes = network(kind, "adaln-zero", None, num_classes=3)
    state = {name: value for name, value in model.state_dict().items() if "y_embedder" not in name}
    projected = F.linear(y.tokens, model.y_embedder.encoder.weight, model.y_embedder.encoder.bias)
    means = [row[mask].mean(0) for row, mask in zip(projected, y.mask, strict=True)]
    state["y_embedder.embedding_table.weight"] = torch.stack([*means, torch.zeros_like(means[0])]).detach()
    classes.load_state_dict(state)
    torch.testing.assert_close(model(x, t, y), classes(x, t, torch.arange(3)))


@pytest.mark.parametrize("conditioning", ["cross-attention", "in-context"])
def test_a_token_is_as_a_class(conditioning: str) -> None:
    """DiT's tokens of time and of a caption of one token are those of time and class."""
    model, (x, t), y = network(DiT, conditioning), inputs(), captions()[:1]
    y = Text(y.tokens.view(3, 1, FEATURES), torch.ones(3, 1, dtype=torch.bool))
    classes = network(DiT, conditioning, None, num_classes=3)
    state = {name: value for name, value in model.state_dict().items() if "y_embedder" not in name}
    rows = F.linear(y.tokens, model.y_embedder.encoder.weight, model.y_embedder.encoder.bias).squeeze(1)
    state["y_embedder.embedding_table.weight"] = F.pad(rows, (0, 0, 0, 1)).detach()
    classes.load_state_dict(state)
    torch.testing.assert_close(model(x, t, with_litter(y, 2)), classes(x, t, torch.arange(3)))


@pytest.mark.parametrize(("kind", "conditioning"), DESIGNS)
def test_conditions_are_known_ahead(kind: Any, conditioning: str) -> None:
    """What a sampler keeps: one row a caption, which it hands out to examples."""
    model, (x, t), y = network(kind, conditioning), inputs(), captions()
    rows = torch.tensor([2, 0, 0])
    known = model.condition(t[:1].expand(3), y)
    assert all(len(tensor) == 3 for tensor in known)
    output = model(x, t[:1].expand(3), condition=[tensor[rows] for tensor in known])
    torch.testing.assert_close(output, model(x, t[:1].expand(3), y[rows]))


@pytest.mark.parametrize(("kind", "conditioning"), DESIGNS)
def test_trains_everything(kind: Any, conditioning: str) -> None:
    for text_features in (0, FEATURES):
        model = network(kind, conditioning, text_features)
        model(*inputs(), captions(text_features)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "conditioning", "text_features"), [(DiT, "in-context", 0), (DiffuSSM, "in-context", 6)]
)
def test_compiles_without_graph_breaks(kind: Any, conditioning: str, text_features: int) -> None:
    torch.compiler.reset()
    model, y = network(kind, conditioning, text_features, depth=1), captions(text_features)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(), y), model(*inputs(), y))


@pytest.mark.parametrize(("kind", "conditioning"), DESIGNS)
def test_runs_in_bfloat16(kind: Any, conditioning: str) -> None:
    model = network(kind, conditioning, 0)
    expected = model(*inputs(), captions(0))
    output = model.bfloat16()(*inputs(), captions(0))
    assert output.dtype == torch.bfloat16
    assert F.mse_loss(output.double(), expected) < 2e-3 * expected.square().mean()
    features = network(kind, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        assert features.float()(inputs()[0].float(), inputs()[1], captions()).isfinite().all()


@pytest.mark.parametrize("scan", ["row", "column-snake"])
def test_captions_come_before_the_image_in_every_scan(scan: Any) -> None:
    """SSM(U) with a caption is the recurrence over its positions, silent where padded, and then the image's."""
    torch.manual_seed(0)
    block = Block(6, 2, ScanOrder(scan, 3, 4), S4D(6, state=4)).double()
    stir(block)
    u = torch.randn(2, 4 + 12, 6, dtype=torch.float64)
    text = torch.tensor([[False, False, True, True], [True] * 4])
    order = list(range(12))
    if scan == "column-snake":
        order = [4 * row + column for column in range(4) for row in (range(3), range(2, -1, -1))[column % 2]]
    caption = u[:, :4].clone()
    caption[0, :2] = 0
    expected = recurrence(block.ssm, torch.cat([caption, u[:, 4:][:, order]], dim=1))
    got = block._scanned(u, text)
    torch.testing.assert_close(got[:, :4], expected[:, :4])
    torch.testing.assert_close(got[:, 4:][:, order], expected[:, 4:])


def test_cross_attention_is_added_to_diffussm_and_nothing_at_first() -> None:
    """A group attends to the tokens before its block does all else."""
    model = DiffuSSM(
        input_size=4, in_channels=2, width=16, depth=1, state=4, text_features=FEATURES, conditioning="cross-attention"
    ).double()
    block = model.blocks[0]
    assert isinstance(block, CrossAttentionBlock)
    assert not block.cross_attn.proj.weight.any()
    x, c = torch.randn(3, 8, 16, dtype=torch.float64), torch.randn(3, 1, 48, dtype=torch.float64)
    tokens, mask = torch.randn(3, 3, 16, dtype=torch.float64), captions().mask
    assert torch.equal(block(x, c, tokens, mask), Block.forward(block, x, c))
    stir(block)
    attended = block.cross_attn(block.norm_cross(x), tokens, mask)
    torch.testing.assert_close(block(x, c, tokens, mask), Block.forward(block, x + attended, c))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(DiT, "adaln", num_classes=3), "either class labels or captions, but has 3 classes and text_"),
        (lambda: network(DiffuSSM, "adaln-zero", num_classes=3), "either class labels or captions"),
        (lambda: network(DiffuSSM, "in-context", None), "conditioning in-context needs captions; set text_features"),
        (lambda: network(DiffuSSM, "adaln"), "conditioning 'adaln' is unknown; closest: adaln-zero"),
        (lambda: network(DiT, "adaln")(*inputs()), "captions are missing; pass y, a Text"),
        (lambda: network(DiT, "adaln")(*inputs(), torch.arange(3)), "y is no Text, but the network was built for capt"),
        (lambda: network(DiT, "adaln")(*inputs(), captions(0)), "captions are bytes, but .* for features of width 6"),
        (lambda: network(DiT, "adaln", 0)(*inputs(), captions()), "captions are features of width 6, but .* for bytes"),
        (lambda: network(DiT, "adaln", 5)(*inputs(), captions()), "features of width 6, but .* features of width 5"),
        (
            lambda: network(DiffuSSM, "adaln-zero", None, num_classes=3)(*inputs(), captions()),
            "y is captions, but the network was built for class labels",
        ),
    ],
)
def test_the_wrong_kind_fails(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        make()


def test_without_captions_nothing_is_added() -> None:
    for kind in (DiT, DiffuSSM):
        names = network(kind, "adaln-zero", None, num_classes=3).state_dict()
        assert not any("cross" in name or "encoder" in name for name in names)
    assert not any(isinstance(m, TextEmbedding) for m in network(DiT, "cross-attention", None).modules())


@pytest.mark.parametrize("length", NGRAMS)
def test_ngrams_have_rows_of_their_own(length: int) -> None:
    """The same letters have the same row wherever they stand; words of a vocabulary nearly all have different ones."""
    first, second = (byte_tokens([caption], 24).tokens for caption in ("bicycle", "a red bicycle"))
    rows = [ngram_rows(tokens, length)[0] for tokens in (first, second)]
    assert all(tokens.shape == (24,) for tokens in rows)
    assert torch.equal(rows[0][length:8], rows[1][6 + length : 14]), "places that see the word alone"
    numbers = [0] * (length - 1) + first[0].tolist()
    for end in range(24):
        value = 0
        for token in reversed(numbers[end : end + length]):
            value = value * HASH_BASE + token
        assert rows[0][end] == value % HASH_PRIME % NGRAM_ROWS
    words = byte_tokens([f"{a}{b}cdef" for a in "abcdefghij" for b in "abcdefghij"], 7).tokens
    ends = ngram_rows(words[:, : length + 1], length)[:, -1]
    assert len(ends.unique()) > 95
    assert max(257 * HASH_BASE**power for power in range(length)) * length < 2**63


# --------------------------------------------------------------------------------------------------------- encoders

ENCODERS = ("t5", "bert", "clip")
SENTENCES = ("a red heart", "", "bicycle", "a red bicycle on a green hill and a heart on a bicycle")


def written(kind: str, folder: Path, seed: int = 0) -> Path:
    """A folder with a tiny model of random weights and a tokenizer of whole words, as transformers writes it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {
        "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
        "clip": {"pad_token": "<end>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"},
    }[kind]
    pattern = {"t5": "$A </s>", "bert": "[CLS] $A [SEP]", "clip": "<start> $A <end>"}[kind]
    words = [*dict.fromkeys(special.values()), "a", "red", "heart", "bicycle", "on", "green", "hill", "and"]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[(word, numbers[word]) for word in special.values()]
    )
    limits = {"model_max_length": 10} if kind == "clip" else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **limits).save_pretrained(folder)
    sizes: dict[str, Any] = {"vocab_size": len(numbers), "pad_token_id": numbers[special["pad_token"]]}
    torch.manual_seed(seed)
    model: Any
    if kind == "t5":
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, **t5, eos_token_id=numbers["</s>"], feed_forward_proj="gated-gelu")
        )
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        if kind == "bert":
            model = transformers.BertModel(transformers.BertConfig(**sizes, **shape, max_position_embeddings=20))
        else:
            ends = {"bos_token_id": numbers["<start>"], "eos_token_id": numbers["<end>"]}
            text = {**sizes, **shape, **ends, "max_position_embeddings": 10}
            vision = {**shape, "image_size": 8, "patch_size": 4}
            model = transformers.CLIPModel(
                transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
            )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    return {kind: written(kind, tmp_path_factory.mktemp(kind)) for kind in ENCODERS}


def expected_features(kind: str, folder: Path, captions: Sequence[str], max_tokens: int) -> list[Tensor]:
    """Each caption's last hidden state alone, without padding, from transformers in float64."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    whole: Any = {"t5": transformers.T5ForConditionalGeneration, "clip": transformers.CLIPModel}.get(
        kind, transformers.BertModel
    )
    model = whole.from_pretrained(folder).double().eval()
    model = {"t5": lambda: model.encoder, "clip": lambda: model.text_model, "bert": lambda: model}[kind]()
    states = []
    for caption in captions:
        tokens = tokenizer(caption, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            states.append(model(input_ids=tokens["input_ids"]).last_hidden_state[0])
    return states


@pytest.mark.parametrize("kind", ENCODERS)
def test_encodes_as_transformers_does(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from mezzotint.conditions.encoders import TextEncoder

    encoder = TextEncoder(str(folders[kind]), max_tokens=12, cache=tmp_path)
    assert (encoder.width, encoder.max_tokens) == (16, 10 if kind == "clip" else 12)
    y = encoder.encode(SENTENCES, batch_size=2)
    expected = expected_features(kind, folders[kind], SENTENCES, encoder.max_tokens)
    assert y.mask.sum(1).tolist() == [len(state) for state in expected]
    assert y.tokens.shape == (4, max(map(len, expected)), 16)
    for row, mask, state in zip(y.tokens, y.mask, expected, strict=True):
        assert state.std() > 0.05
        assert (row[mask].double() - state).abs().max() < 1e-5
        assert not row[~mask].any()
    alone = encoder.encode([SENTENCES[0]], cached=False)
    assert (alone.tokens[0] - y[:1].tokens[0, : alone.mask.shape[1]]).abs().max() < 1e-5
    assert not y.tokens.requires_grad


def test_bfloat16_features(folders: dict[str, Path], tmp_path: Path) -> None:
    from mezzotint.conditions.encoders import TextEncoder

    single = TextEncoder(str(folders["t5"]), cache=tmp_path).encode(SENTENCES)
    encoder = TextEncoder(str(folders["t5"]), precision="bf16", cache=tmp_path)
    half, again = encoder.encode(SENTENCES), encoder.encode(SENTENCES)
    assert half.tokens.dtype == torch.bfloat16
    assert torch.equal(half.tokens, again.tokens)
    assert F.mse_loss(half.tokens.float(), single.tokens) < 4e-3 * single.tokens.square().mean()


def test_features_are_kept(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed once, by whatever process; nothing is computed for a copy of the folder, all is for other weights."""
    from mezzotint.conditions.encoders import TextEncoder

    computed: list[int] = []
    compute = TextEncoder._computed

    def counted(self: Any, some: Any) -> Any:
        computed.append(len(some))
        return compute(self, some)

    monkeypatch.setattr(TextEncoder, "_computed", counted)
    first = TextEncoder(str(folders["bert"]), cache=tmp_path).encode([*SENTENCES, *SENTENCES], batch_size=3)
    assert computed == [3, 1]
    copy = shutil.copytree(folders["bert"], tmp_path / "copy")
    encoder = TextEncoder(str(copy), cache=tmp_path)
    again = encoder.encode([*SENTENCES, *SENTENCES])
    assert computed == [3, 1]
    assert torch.equal(again.tokens, first.tokens)
    encoder.encode(["a green hill"], cached=False)
    encoder.encode(["a green hill"], cached=False)
    assert computed[2:] == [1, 1]
    encoder.encode(SENTENCES[:1], cached=False)
    assert computed[2:] == [1, 1, 1], "what is not to be kept is not looked for, either"
    assert [path.suffix for path in tmp_path.glob("*.*")] == [".sqlite3"]
    other = TextEncoder(str(written("bert", tmp_path / "other", seed=1)), cache=tmp_path)
    assert other.digest != encoder.digest
    assert not torch.equal(other.encode(SENTENCES).tokens, first.tokens[:4])
    tuned = Path(shutil.copytree(folders["bert"], tmp_path / "tuned"))
    settings = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 0.1}))
    assert TextEncoder(str(tuned), cache=tmp_path).digest != encoder.digest, "the same weights compute something else"
    short = TextEncoder(str(copy), max_tokens=4, cache=tmp_path).encode(SENTENCES)
    assert short.mask.shape == (4, 4)


def test_a_damaged_cache_is_no_matter(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mezzotint.conditions.encoders import TextEncoder

    encoder = TextEncoder(str(folders["t5"]), cache=tmp_path)
    expected = encoder.encode(SENTENCES).tokens
    (file,) = tmp_path.glob("*.sqlite3")
    for damage in ("data = zeroblob(length(data))", "data = substr(data, 5)", "data = zeroblob(64), checksum = 0"):
        with sqlite3.connect(file) as database:
            database.execute(f"UPDATE features SET {damage}")
        assert torch.equal(encoder.encode(SENTENCES).tokens, expected)
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*), max(length(data)) > 64 FROM features").fetchone() == (4, 1)
    assert not caplog.records
    file.write_bytes(b"no database at all, but something else of some length" * 100)
    for _ in range(2):
        assert torch.equal(encoder.encode(SENTENCES).tokens, expected)
    assert ["cannot be read" in r.message or "cannot be written" in r.message for r in caplog.records] == [True]
    blocked = TextEncoder(str(folders["t5"]), cache=file)
    assert torch.equal(blocked.encode(SENTENCES).tokens, expected)


def test_default_cache(folders: dict[str, Path]) -> None:
    from mezzotint.conditions.encoders import TextEncoder
    from mezzotint.files import cache_folder

    encoder = TextEncoder(str(folders["clip"]))
    encoder.encode(["a heart"])
    assert (cache_folder() / "captions" / f"clip_text_model-{encoder.digest}-fp32.sqlite3").is_file()


def test_impossible_encoders_fail(folders: dict[str, Path], tmp_path: Path) -> None:
    from mezzotint.conditions.encoders import TextEncoder

    with pytest.raises(MezzotintError, match=r"no text encoder could be read from the folder .*name that folder"):
        TextEncoder(str(tmp_path))
    with pytest.raises(MezzotintError, match="max_tokens 2 has no room beside 2 special tokens; raise it"):
        TextEncoder(str(folders["bert"]), max_tokens=2)
    with pytest.raises(MezzotintError, match="precision 'fp16' is unknown; known: fp32, bf16"):
        TextEncoder(str(folders["bert"]), precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(MezzotintError, match="there are no captions to encode"):
        TextEncoder(str(folders["bert"])).encode([])
    from safetensors.torch import load_file, save_file

    lacking = shutil.copytree(folders["bert"], tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(MezzotintError, match=r"lacks 1 of its weights \(encoder.layer.1.output.dense.weight"):
        TextEncoder(str(lacking))

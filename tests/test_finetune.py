"""Starting from other weights: what is kept, what is trained, and LoRA."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHORT
from PIL import Image
from safetensors.torch import load_file
from test_mdm_checkpoints import filled, layout

import mezzotint
from mezzotint.conditions import Condition, Text
from mezzotint.conditions.text import byte_tokens
from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.interop import Checkpoint, convert
from mezzotint.pipeline import Pipeline, build
from mezzotint.recipe import Recipe, load_recipe, override_recipe
from mezzotint.samplers import Sampler
from mezzotint.training.finetune import choose_trainable, initialise, merged, start_from, take_classes

LORA = ("training.lora.rank=2", "training.lora.alpha=4")


def with_random_weights(recipe: Recipe, names: tuple[str, ...] = ()) -> Pipeline:
    """A network none of whose layers starts at zero, as a trained one's."""
    pipeline = build(recipe, class_names=names)
    generator = torch.Generator().manual_seed(7)
    for parameter in pipeline.denoiser.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def checkpoint_of(pipeline: Pipeline) -> Checkpoint:
    tensors = {name: tensor.clone() for name, tensor in pipeline.denoiser.backbone.state_dict().items()}
    return Checkpoint(tensors, pipeline.recipe, pipeline.class_names, "there.pt")


def output(pipeline: Pipeline, y: list[int] | None) -> torch.Tensor:
    """The network's own output at fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *pipeline.denoiser.in_shape, generator=generator)
    t = torch.tensor([100.0, 700.0])
    with torch.no_grad():
        return pipeline.denoiser.backbone(x, t, None if y is None else torch.tensor(y))


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / f"{name}.safetensors")


def table(pipeline: Pipeline) -> torch.Tensor:
    return pipeline.denoiser.backbone.state_dict()["y_embedder.embedding_table.weight"]


@pytest.fixture
def three(tiny: Recipe) -> Recipe:
    return override_recipe(tiny, ["backbone.num_classes=3"])


@pytest.fixture
def base(tiny: Recipe, tmp_path: Path) -> Path:
    """A run of two steps, to start from."""
    mezzotint.train(override_recipe(tiny, ["training.steps=2", "training.ema=[]"]), tmp_path / "base", quiet=True)
    return tmp_path / "base"


# --------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ((), ("tench", "eft", "cock")),
        (("tench", "eft", "cock"), ("tench", "eft", "cock")),
        (("tench", "eft", "cock"), ("tench, Tinca tinca", "Eft", "cock")),
        (("tench", "eft", "cock"), ("n01440764", "n01631663", "n01514668")),
    ],
)
def test_the_same_classes_are_kept(three: Recipe, theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    there, here = with_random_weights(three, theirs), build(three, class_names=ours)
    assert initialise(here, checkpoint_of(there)) == []
    assert torch.equal(output(here, [0, 2]), output(there, [0, 2]))


@pytest.mark.parametrize("classes", [2, 3])
def test_new_classes_get_fresh_rows_and_the_null_row_stays(three: Recipe, classes: int) -> None:
    there = with_random_weights(three, ("a", "b", "c"))
    here = build(override_recipe(three, [f"backbone.num_classes={classes}"]), class_names=tuple("abx"[:classes]))
    fresh = table(here)[:-1].clone()
    (note,) = initialise(here, checkpoint_of(there))
    assert note == f"the label table is new ({classes} classes here, 3 there) but for its null row, which is kept"
    assert torch.equal(table(here)[:-1], fresh)
    assert torch.equal(output(here, [classes, classes]), output(there, [3, 3]))


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln"])
def test_no_classes_is_the_null_class_built_in(three: Recipe, conditioning: str) -> None:
    three = override_recipe(three, [f"backbone.conditioning={conditioning}"])
    there, here = with_random_weights(three), build(override_recipe(three, ["backbone.num_classes=0"]))
    (note,) = initialise(here, checkpoint_of(there))
    assert note == "its label table (3 classes) is dropped; the null class is built in"
    torch.testing.assert_close(output(here, None), output(there, [3, 3]), rtol=1e-5, atol=1e-5)

    again = build(three)
    (note,) = initialise(again, checkpoint_of(here))
    assert note == "the label table is new (3 classes here, none there)"
    assert torch.equal(output(again, [3, 3]), output(here, None)), "the new null row adds nothing"
    assert not torch.equal(output(again, [0, 1]), output(here, None))


@pytest.mark.parametrize("conditioning", ["cross-attention", "in-context"])
def test_a_null_token_cannot_be_built_in(three: Recipe, conditioning: str) -> None:
    three = override_recipe(three, [f"backbone.conditioning={conditioning}"])
    here = build(override_recipe(three, ["backbone.num_classes=0"]))
    (note,) = initialise(here, checkpoint_of(with_random_weights(three)))
    assert "and with it the token of the null class" in note
    assert output(here, None).isfinite().all()


def test_another_resolution_has_its_own_positions(three: Recipe) -> None:
    there, here = with_random_weights(three), build(override_recipe(three, ["data.size=12"]))
    positions = here.denoiser.backbone.state_dict()["pos_embed"].clone()
    assert initialise(here, checkpoint_of(there)) == []
    kept = here.denoiser.backbone.state_dict()
    assert torch.equal(kept.pop("pos_embed"), positions)
    assert positions.shape == (1, 36, 16)
    for name, tensor in kept.items():
        assert torch.equal(tensor, there.denoiser.backbone.state_dict()[name]), name


@pytest.mark.parametrize(
    ("there", "here", "kept"),
    [
        ("learned", "none", 1),
        ("unused", "none", 1),
        ("none", "learned", 1),
        ("none", "unused", 1),
        ("unused", "learned", 1),
        ("learned", "unused", 2),
    ],
)
def test_the_variance_s_half_of_the_output(three: Recipe, there: str, here: str, kept: int) -> None:
    """By the network's own output: the channels that both mean are the same, new ones are zero."""
    words = ["interpolant=ddpm", "target=noise", "sampling=ddpm"]
    old = with_random_weights(override_recipe(three, [*words, f"variance={there}"]))
    new = build(override_recipe(three, [*words, f"variance={here}"]))
    notes = initialise(new, checkpoint_of(old))
    assert notes == (["the learned variance is new: half-way between its bounds"] if here == "learned" else [])
    expected, found = output(old, [0, 1]), output(new, [0, 1])
    torch.testing.assert_close(found[:, :kept], expected[:, :kept])
    assert not found[:, kept:].any()


def test_another_network_is_refused_and_named(three: Recipe) -> None:
    there = with_random_weights(three)
    here = build(override_recipe(three, ["backbone.patch_size=4", "backbone.depth=2"]))
    sentence = (
        r"there\.pt, which is another network: backbone\.patch_size \(2 there, 4 here\), backbone\.depth \(1 there"
    )
    with pytest.raises(MezzotintError, match=sentence):
        initialise(here, checkpoint_of(there))
    colour = build(override_recipe(three, ["data.channels=3"]))
    with pytest.raises(MezzotintError, match=r"channels \(1 there, 3 here\)"):
        initialise(colour, checkpoint_of(there))


def test_other_words_are_named(three: Recipe) -> None:
    words = ["interpolant=gvp", "target=noise", "time_input=[1000,-1]", "backbone.freq_shift=1"]
    (note,) = initialise(build(three), checkpoint_of(with_random_weights(override_recipe(three, words))))
    assert note == (
        "it was trained with target (noise there, velocity here), interpolant.name (gvp there, linear here), "
        "time_input ([1000.0, -1.0] there, [1000.0, 0.0] here), backbone.freq_shift (1 there, 0 here); what that "
        "changes has to be learnt anew"
    )


def test_classes_are_the_data_set_s(tiny: Recipe) -> None:
    official = override_recipe(tiny, ["backbone.num_classes=1000", "guidance.scale=4"])
    taken = take_classes(official, ("cat", "dog"))
    assert (taken.backbone.num_classes, taken.guidance.scale) == (2, 4)
    taken = take_classes(official, ())
    assert (taken.backbone.num_classes, taken.guidance.scale) == (0, 1)
    assert take_classes(override_recipe(official, ["backbone.num_classes=0"]), ("cat", "dog")).backbone.num_classes == 0
    taken = take_classes(override_recipe(official, ["condition=text"]), ("cat", "dog"))
    assert (taken.backbone.num_classes, taken.guidance.scale) == (0, 4), "captions are no classes"


# ------------------------------------------------------------------------------------------------ other backbones

DIFFUSSM = "backbone={name: diffussm, width: 16, depth: 2, state: 4, hourglass: 2}"
UNET = "backbone={name: unet, channels: [8, 16], resblocks: [1, 1], attention: [0, 1], heads: 2, time_width: 16}"
OUTER = "{channels: [4, 8], resblocks: [1, 1], groups: 4}"
WIDER = "{channels: [4, 4], resblocks: [1, 1], groups: 4, micro_scale: 32}"
BYTES = ("condition={name: text, max_tokens: 8}", "backbone={num_classes: 0, text_features: 0, text_width: 12}")
FEATURES = (*BYTES, "condition.encoder=models/t5", "backbone.text_features=6")


def unet(*changes: str, outer: tuple[str, ...] = (), size: int = 8) -> Recipe:
    """A UNet on 8 × 8 images, and levels around it."""
    words = ["backbone.num_classes=3", UNET, f"backbone.outer=[{', '.join(outer)}]"]
    return load_recipe("digits", [*words, f"data.size={size * 2 ** len(outer)}", *SHORT, *changes])


def asked_for(pipeline: Pipeline) -> Condition | None:
    """Of two examples: classes or captions, of unequal length."""
    if (width := pipeline.recipe.backbone.text_features) is None:
        return torch.tensor([0, 2]) if pipeline.denoiser.num_classes else None
    y = byte_tokens(["one", "a seven"], 8)
    if width:
        return Text((y.tokens.unsqueeze(-1) * torch.arange(1.0, 1 + width)).sin() * y.mask.unsqueeze(-1), y.mask)
    return y


@torch.no_grad()
def predicted(pipeline: Pipeline, x: torch.Tensor | None = None, y: Condition | None = None) -> torch.Tensor:
    """The network's own output, at fixed inputs where none are given."""
    if x is None:
        x = torch.randn(2, *pipeline.denoiser.in_shape, generator=torch.Generator().manual_seed(3))
    y = asked_for(pipeline) if y is None else y
    return pipeline.denoiser.backbone(x, torch.tensor([100.0, 700.0]), y)


@pytest.mark.parametrize("words", [DIFFUSSM, UNET], ids=["diffussm", "unet"])
def test_every_backbone_is_kept_and_fits_its_labels(words: str) -> None:
    recipe = load_recipe("digits", [words, "backbone.num_classes=3"])
    there, here = with_random_weights(recipe, ("a", "b", "c")), build(recipe)
    assert initialise(here, checkpoint_of(there)) == []
    assert torch.equal(predicted(here), predicted(there))

    null, none = torch.tensor([3, 3]), build(override_recipe(recipe, ["backbone.num_classes=0"]))
    assert initialise(none, checkpoint_of(there)) == [
        "its label table (3 classes) is dropped; the null class is built in"
    ]
    torch.testing.assert_close(predicted(none), predicted(there, y=null), rtol=1e-5, atol=1e-5)
    again = build(recipe)
    assert initialise(again, checkpoint_of(none)) == ["the label table is new (3 classes here, none there)"]
    assert torch.equal(predicted(again, y=null), predicted(none))

    learned = ["interpolant=ddpm", "target=noise", "sampling=ddpm", "variance=learned"]
    new = build(override_recipe(recipe, learned))
    notes = initialise(new, checkpoint_of(there))
    assert notes[0] == "the learned variance is new: half-way between its bounds"
    assert torch.equal(predicted(new)[:, :1], predicted(there))
    assert not predicted(new)[:, 1:].any()


@pytest.mark.parametrize("more", [(), BYTES], ids=["classes", "captions"])
def test_a_matryoshka_network_grows_around_what_it_starts_from(more: tuple[str, ...]) -> None:
    """Bit for bit the small network's output at the low resolutions, a level at a time."""
    smaller = with_random_weights(unet(*more))
    for outer, side in (((OUTER,), 16), ((OUTER, WIDER), 32)):
        larger = build(unet(*more, outer=outer))
        (note,) = initialise(larger, checkpoint_of(smaller))
        assert note == f"the outer levels ({side} × {side}) are new"
        low = torch.randn(2, *smaller.denoiser.in_shape, generator=torch.Generator().manual_seed(5))
        whole = torch.randn(2, *larger.denoiser.in_shape, generator=torch.Generator().manual_seed(6))
        count = low.flatten(1).shape[1]
        whole[:, :count] = low.flatten(1)
        expected = predicted(smaller, low).flatten(1)
        assert expected.std() > 1e-3
        assert torch.equal(predicted(larger, low.flatten(1)), expected)
        assert torch.equal(predicted(larger, whole)[:, :count], expected)
        assert not predicted(larger, whole)[:, count:].any(), "the new level's output layer starts at zero"
        for parameter in larger.denoiser.parameters():  # as if it had learnt
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
        smaller = larger


def test_two_levels_at_once_around_another_kind_of_network() -> None:
    dit = ["backbone={name: dit, width: 16, depth: 1, heads: 2}", "backbone.num_classes=3"]
    words = unet(outer=(OUTER, OUTER), size=8)
    small = with_random_weights(load_recipe("digits", dit))
    large = build(override_recipe(words, ["backbone.outer=[]", *dit, f"backbone.outer=[{OUTER}, {OUTER}]"]))
    assert initialise(large, checkpoint_of(small)) == ["the outer levels (16 × 16, 32 × 32) are new"]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(predicted(large, x.flatten(1)), predicted(small, x).flatten(1))


def test_a_grown_network_s_labels(tmp_path: Path) -> None:
    """A UNet's label is added to the time of all levels, so that is where the null class goes."""
    there, none = with_random_weights(unet(outer=(OUTER,))), build(unet("backbone.num_classes=0", outer=(OUTER,)))
    assert initialise(none, checkpoint_of(there)) == [
        "its label table (3 classes) is dropped; the null class is built in"
    ]
    expected = predicted(there, y=torch.tensor([3, 3]))
    torch.testing.assert_close(predicted(none), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    larger = build(unet("backbone.num_classes=2", outer=(OUTER, WIDER)))
    grown, labels = initialise(larger, checkpoint_of(there))
    assert grown == "the outer levels (32 × 32) are new"
    assert labels == "the label table is new (2 classes here, 3 there) but for its null row, which is kept"


def test_what_reads_captions_is_kept_for_the_same_ones(tmp_path: Path) -> None:
    there = with_random_weights(unet(*FEATURES))
    same = build(unet(*FEATURES, "condition.encoder=/elsewhere/t5"))
    assert initialise(same, checkpoint_of(there)) == []
    assert torch.equal(predicted(same), predicted(there))
    (note,) = initialise(build(unet(*FEATURES, "condition.encoder=bert")), checkpoint_of(there))
    assert (
        note == "it was trained with condition.encoder (t5 there, bert here); what that changes has to be learnt anew"
    )

    def started(here: Pipeline) -> tuple[str, set[str]]:
        """The first note, and what is not the checkpoint's."""
        note, *_ = initialise(here, checkpoint_of(there))
        old, new = (p.denoiser.backbone.state_dict() for p in (there, here))
        return note, {n for n in new if n not in old or old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}

    note, fresh = started(build(unet(*BYTES)))
    assert note == "what reads captions is new (bytes here, features of width 6 there)"
    assert {name.partition("encoder.")[0] for name in fresh} == {"y_embedder.embedder."}
    note, fresh = started(build(unet("backbone.num_classes=0")))
    assert note == "what reads captions is dropped (none here, features of width 6 there)"
    assert not fresh
    there = with_random_weights(unet("backbone.num_classes=0"))
    note, fresh = started(build(unet(*BYTES)))
    assert note == "what reads captions is new (bytes here, none there)"
    assert all(re.search(r"^y_embedder\.|\.norm_cond\.|\.kv_cond\.", name) for name in fresh)


def test_networks_that_do_not_grow_into_each_other() -> None:
    two = with_random_weights(unet(outer=(OUTER,)))

    def refused(sentence: str, *changes: str, outer: tuple[str, ...] = (OUTER,)) -> None:
        with pytest.raises(MezzotintError, match=sentence):
            initialise(build(unet(*changes, outer=outer)), checkpoint_of(two))

    refused(r"there\.pt, which has 2 levels, where this recipe has 1; set backbone\.outer as it is there", outer=())
    refused(r"another network: backbone\.outer\[0\]\.channels \(\(4, 8\) there, \(4, 4\) here\)", outer=(WIDER, OUTER))
    refused(r"backbone\.resblocks \(\(1, 1\) there, \(2, 1\) here\)", "backbone.resblocks=[2, 1]")
    refused(r"the outer levels \(32 × 32\) are new; set training\.lora\.rank=0", "init=x", *LORA, outer=(OUTER, WIDER))
    with pytest.raises(MezzotintError, match=r"backbone\.name \(unet there, diffussm here\)"):
        initialise(build(load_recipe("digits", [DIFFUSSM])), checkpoint_of(with_random_weights(unet())))


def test_words_of_levels_are_named() -> None:
    two = with_random_weights(unet(outer=(OUTER,)))
    normalised = OUTER.replace("}", ", normalise_input: true, dropout: 0.1}")
    larger = build(unet("interpolant.snr_power=2", "condition.max_tokens=9", outer=(normalised, WIDER)))
    _, note = initialise(larger, checkpoint_of(two))
    assert "trained with interpolant.snr_power (1.0 there, 2.0 here), backbone.outer[0].normalise_input (False" in note
    one, grown = with_random_weights(unet()), build(unet("interpolant.snr_power=2", outer=(OUTER,)))
    assert len(initialise(grown, checkpoint_of(one))) == 1, "one resolution has no power"


def test_an_official_mdm_file_grows(tmp_path: Path) -> None:
    sizes = {"channels": (32, 64), "resblocks": (1, 1), "attention": (0, 2), "feed_forward": True}
    torch.save({"state_dict": filled(dict(layout((sizes,))))}, tmp_path / "vis_model.pth")
    small = mezzotint.load(tmp_path / "vis_model.pth")
    around = [f"init={tmp_path / 'vis_model.pth'}", f"backbone.outer=[{WIDER}]", "data.size=128"]
    large = build(override_recipe(small.recipe, around))
    assert start_from(str(tmp_path / "vis_model.pth"), large) == ["the outer levels (128 × 128) are new"]
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(predicted(large, x.flatten(1)), predicted(small, x).flatten(1))


def test_a_run_grows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trained small, grown by `init`, trained on: the first step starts from the small run's weights."""
    short = ("training.steps=1", "training.ema=[]", "training.batch_size=4", "guidance.scale=3")
    mezzotint.train(unet(*BYTES, *short), tmp_path / "small", quiet=True)
    large = unet(*BYTES, *short, f"init={tmp_path / 'small'}", "training.lr=1e-9", outer=(OUTER,))
    trained = mezzotint.train(large, tmp_path / "large", quiet=True)
    assert caplog.messages == [f"{tmp_path / 'small'}: the outer levels (16 × 16) are new"]
    assert trained.recipe.guidance.scale == 3, "captions guide"
    start, end = weights(tmp_path / "small"), weights(tmp_path / "large")
    for name, tensor in start.items():
        torch.testing.assert_close(end[f"inner.{name}"], tensor, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------ runs that go on


def test_a_run_starts_from_another_and_resumes_without_it(
    tiny: Recipe, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = override_recipe(tiny, [f"init={base}", "training.lr=1e-9", "training.steps=4"])
    mezzotint.train(recipe, tmp_path / "whole", quiet=True)
    assert mezzotint.load_recipe(tmp_path / "whole").init == str(base)
    start, end = weights(base), weights(tmp_path / "whole")
    for name, tensor in start.items():
        torch.testing.assert_close(end[name], tensor, rtol=0, atol=1e-7)
    assert not caplog.text, "the same network, the same words"

    mezzotint.train(override_recipe(recipe, ["training.steps=2"]), tmp_path / "parts", quiet=True)
    shutil.copytree(tmp_path / "parts", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "state")
    with pytest.raises(MezzotintError, match=r"another recipe: init \(.*base there, elsewhere here\)"):
        mezzotint.train(override_recipe(recipe, ["init=elsewhere"]), tmp_path / "lost", resume=True, quiet=True)
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    shutil.rmtree(base)
    mezzotint.train(recipe, tmp_path / "parts", resume=True, quiet=True)
    mezzotint.train(override_recipe(recipe, ["init=elsewhere"]), tmp_path / "moved", resume=True, quiet=True)
    for run in (tmp_path / "parts", tmp_path / "moved"):
        for name, tensor in weights(run).items():
            assert torch.equal(tensor, end[name]), name
    with pytest.raises(MezzotintError):
        mezzotint.train(recipe, tmp_path / "late", quiet=True)
    assert not (tmp_path / "late").exists()


def test_other_words_are_warned_of(tiny: Recipe, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = override_recipe(tiny, [f"init={base}", "target=data", "training.steps=1"])
    mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert "it was trained with target (velocity there, data here)" in caplog.text


# ---------------------------------------------------------------------------------------------------- what is frozen


def trainable(pipeline: Pipeline) -> set[str]:
    return {name for name, p in pipeline.denoiser.backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["blocks.*", "final_layer", "t_embedder.mlp"], {"x_embedder.proj", "y_embedder.embedding_table"}),
        (["*", "!y_embedder"], {"y_embedder.embedding_table"}),
        (["*", "!blocks.*.attn.*", "*.qkv.*"], {"blocks.0.attn.proj"}),
    ],
)
def test_freeze_the_last_pattern_wins(tiny: Recipe, patterns: list[str], trained: set[str]) -> None:
    recipe = override_recipe(tiny, ["backbone.num_classes=10", f"training.freeze={json.dumps(patterns)}"])
    pipeline = build(recipe)
    line = choose_trainable(pipeline.denoiser.backbone, recipe.training, 0)
    assert {name.rpartition(".")[0] for name in trainable(pipeline)} == trained
    assert line.startswith("training ")
    assert line.endswith(f" of {sum(p.numel() for p in pipeline.denoiser.parameters()):,} parameters")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["block.*"], r"training\.freeze 'block\.\*' matches no parameter; closest: .*blocks\.\*\."),
        (["*"], r"training\.freeze \* leaves nothing to train"),
    ],
)
def test_freeze_that_cannot_be(tiny: Recipe, tmp_path: Path, patterns: list[str], message: str) -> None:
    recipe = override_recipe(tiny, [f"training.freeze={json.dumps(patterns)}"])
    with pytest.raises(MezzotintError, match=message):
        mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["training.freeze=[blocks.*, x_embedder]"], list(LORA)], ids=["freeze", "lora"])
def test_what_is_frozen_stays_and_resuming_is_bit_for_bit(
    tiny: Recipe, base: Path, tmp_path: Path, options: list[str]
) -> None:
    more = ["training.ema=[0.5, 0.9]", "training.weight_decay=0.1", "training.lr=1e-2"]
    recipe = override_recipe(tiny, [f"init={base}", *more, *options])
    mezzotint.train(recipe, tmp_path / "whole", quiet=True)
    start, end = weights(base), weights(tmp_path / "whole")
    assert start.keys() == end.keys(), "a plain network, LoRA or not"
    same = {name for name in start if torch.equal(start[name], end[name])} - {"pos_embed"}
    if options == list(LORA):
        changed = {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        assert same == start.keys() - {"pos_embed", "y_embedder.embedding_table.weight"} - changed
    else:
        assert same == {name for name in start if name.startswith(("blocks", "x_embedder"))}

    mezzotint.train(override_recipe(recipe, ["training.steps=3"]), tmp_path / "parts", quiet=True)
    mezzotint.train(recipe, tmp_path / "parts", resume=True, quiet=True)
    for name in ("model", "model-ema-0.9"):
        other = weights(tmp_path / "whole", name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in weights(tmp_path / "parts", name).items())


# ------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_starts_without_effect_and_merges_into_a_plain_network(three: Recipe) -> None:
    pipeline, plain = with_random_weights(three), with_random_weights(three)
    recipe = override_recipe(three, ["init=x", *LORA])
    choose_trainable(pipeline.denoiser.backbone, recipe.training, 0)
    assert torch.equal(output(pipeline, [0, 1]), output(plain, [0, 1]))
    low_rank = {name for name in trainable(pipeline) if "lora_" in name}
    assert len(low_rank) == 8
    assert trainable(pipeline) - low_rank == {"y_embedder.embedding_table.weight"}
    for name, parameter in pipeline.denoiser.backbone.named_parameters():
        if name in low_rank:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = output(pipeline, [0, 1])
    assert not torch.allclose(adapted, output(plain, [0, 1]), atol=1e-2)
    a, b = (pipeline.denoiser.backbone.get_parameter(f"blocks.0.mlp.fc1.lora_{x}.default.weight") for x in "AB")
    before = plain.denoiser.backbone.state_dict()["blocks.0.mlp.fc1.weight"].clone()
    plain.denoiser.backbone.load_state_dict(merged(pipeline.denoiser.backbone).state_dict())
    torch.testing.assert_close(output(plain, [0, 1]), adapted, rtol=1e-4, atol=1e-4)
    after = plain.denoiser.backbone.state_dict()["blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(after, before + 4 / 2 * b @ a)
    assert torch.equal(output(pipeline, [0, 1]), adapted), "merging leaves the network as it was"


def test_the_adapter_is_peft_s(tiny: Recipe, base: Path, tmp_path: Path) -> None:
    """On the network as the run started it, peft's own loader gives the run's merged network."""
    from peft import PeftModel

    more = ['training.freeze=["!final_layer.linear"]', "training.lr=1e-2", "training.ema=[0.5]"]
    mezzotint.train(override_recipe(tiny, [f"init={base}", *LORA, *more]), tmp_path / "run", quiet=True)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 8 + 1 + 2, "eight low-rank matrices, the label table, the last layer's weight and bias"
    pipeline, run = mezzotint.build(mezzotint.load_recipe(tmp_path / "run")), mezzotint.load(tmp_path / "run")
    start_from(str(base), pipeline)
    before = output(pipeline, [0, 1])
    pipeline.denoiser.backbone = PeftModel.from_pretrained(pipeline.denoiser.backbone, tmp_path / "run" / "adapter")
    expected = output(run, [0, 1])
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(output(pipeline, [0, 1]), expected, rtol=1e-4, atol=1e-5)


def test_lora_is_drawn_by_the_recipe_s_seed(tiny: Recipe, base: Path, tmp_path: Path) -> None:
    words = [f"init={base}", *LORA, "training.steps=1", "training.lr=1e-12", "training.ema=[]"]  # it hardly moves
    drawn = []
    for number, seed in enumerate((0, 1, 0)):
        run = tmp_path / str(number)
        mezzotint.train(override_recipe(tiny, [*words, f"seed={seed}"]), run, quiet=True)
        adapter = load_file(run / "adapter" / "adapter_model.safetensors")
        drawn.append(adapter["base_model.model.blocks.0.mlp.fc1.lora_A.weight"])
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_lora_returns_what_it_saved_and_leaves_random_numbers_alone(tiny: Recipe, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    recipe = override_recipe(tiny, [f"init={base}", *LORA, "training.steps=2"])
    trained = mezzotint.train(recipe, tmp_path / "run", quiet=True)
    assert torch.equal(torch.rand(1), expected)
    saved = mezzotint.load(tmp_path / "run")
    assert trained.denoiser.state_dict().keys() == saved.denoiser.state_dict().keys()
    assert torch.equal(output(trained, [0, 1]), output(saved, [0, 1]))


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ((DIFFUSSM, "backbone.num_classes=3"), "w0 up ssm_out down.0 down.1 w1 w2 w3"),
        ((UNET, "backbone.num_classes=3", "backbone.feed_forward=true"), "qkv proj ffn.0 ffn.2"),
        ((UNET, f"backbone.outer=[{OUTER}]", *BYTES), "qkv proj kv_cond"),
        (("backbone={name: dit, width: 16, depth: 1, heads: 2}", "backbone={num_classes: 0, text_features: 0}",
          "condition=text"), "attn.qkv attn.proj mlp.fc1 mlp.fc2"),
    ],
    ids=["diffussm", "unet", "nested", "dit"],
)  # fmt: skip
def test_lora_goes_where_the_network_has_its_layers(words: tuple[str, ...], layers: str) -> None:
    """By default, and trained beside it is what reads labels or captions, however deep that lies."""
    recipe = load_recipe("digits", [*words, "init=x", *LORA])
    pipeline = with_random_weights(recipe)
    plain = predicted(pipeline)
    choose_trainable(pipeline.denoiser.backbone, recipe.training, 0)
    torch.testing.assert_close(predicted(pipeline), plain, rtol=1e-5, atol=1e-6)
    trained = trainable(pipeline)
    low_rank = {name.partition(".lora_")[0] for name in trained if "lora_" in name}
    assert all(name.endswith(tuple(layers.split())) for name in low_rank)
    assert all(any(name.endswith(layer) for name in low_rank) for layer in layers.split())
    assert all("y_embedder" not in name for name in low_rank)
    reads = {name for name, _ in pipeline.denoiser.backbone.named_parameters() if "y_embedder" in name}
    assert {name for name in trained if "lora_" not in name} == reads != set()
    for name, parameter in pipeline.denoiser.backbone.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = predicted(pipeline)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    pipeline.denoiser.backbone = merged(pipeline.denoiser.backbone)
    torch.testing.assert_close(predicted(pipeline), adapted, rtol=1e-4, atol=1e-4 * adapted.abs().max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["training.lora.targets=[attn.qvk]"],
            r"'attn\.qvk' matches no linear layer; closest: .*blocks\.\*\.attn\.qkv",
        ),
        (["training.lora.targets=[x_embedder.proj]"], r"'x_embedder\.proj' matches no linear layer"),
        (
            ['training.freeze=["!blocks.*.qkv.*"]'],
            r"lets blocks\.0\.attn\.qkv train in full, which LoRA adapts already",
        ),
        (["init=null"], r"training\.lora adapts weights that are there already: set init"),
    ],
)
def test_lora_that_cannot_be(tiny: Recipe, base: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        mezzotint.train(override_recipe(tiny, [f"init={base}", *LORA, *options]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_lora_without_peft(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        MezzotintError, match=r"needs the package peft; install it with: pip install 'mezzotint\[lora\]'"
    ):
        choose_trainable(build(tiny).denoiser.backbone, override_recipe(tiny, ["init=x", *LORA]).training, 0)


# --------------------------------------------------------------------------------------------------- the whole way

TINY_DIT = (
    "data.size=32",
    "data.workers=0",
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.heads=2",
    "backbone.num_classes=10",
    "training.steps=4",
    "training.batch_size=4",
    "training.lr=1e-3",
    "training.ema=[0.5]",
)


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """An AutoencoderKL of stride 8 with a few thousand weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4] * 4,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.18215,
    )
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures of two classes."""
    generator = torch.Generator().manual_seed(1)
    for i in range(8):
        folder = tmp_path / "pictures" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (70, 80, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_from_an_official_file_to_diffusers(
    lora: bool, autoencoder: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Convert, fine-tune at another resolution with other classes, sample, export, and sample there: same pictures."""
    from diffusers import DiTPipeline

    words = load_recipe("dit-xl-2-256", [*TINY_DIT, f"representation.path={autoencoder}"])
    official = with_random_weights(words).denoiser.backbone
    torch.save({"ema": official.state_dict()}, tmp_path / "DiT-tiny.pt")
    convert(tmp_path / "DiT-tiny.pt", tmp_path / "converted", recipe=words)

    init = tmp_path / ("converted" if lora else "DiT-tiny.pt")
    finer = override_recipe(words, [f"init={init}", f"data=folder:{pictures}", "data.size=64", *(LORA if lora else ())])
    mezzotint.train(finer, tmp_path / "run", quiet=True)
    assert "the label table is new (2 classes here, 10 there) but for its null row, which is kept" in caplog.text
    assert ("it does not say all that its weights mean" in caplog.text) != lora, "a bare file does not tell its heads"
    run = mezzotint.load(tmp_path / "run")
    assert run.class_names == ("cat", "dog")
    parameters = {name for name, _ in official.named_parameters()}
    changed = {
        n for n in parameters if not torch.equal(official.get_parameter(n), run.denoiser.backbone.get_parameter(n))
    }
    low_rank = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert changed == ({*low_rank, "y_embedder.embedding_table.weight"} if lora else parameters)
    assert mezzotint.sample(run, ["dog"], 2, steps=2).shape == (2, 3, 64, 64)

    convert(tmp_path / "run", tmp_path / "exported", to="diffusers")
    pipe = DiTPipeline.from_pretrained(tmp_path / "exported")
    pipe.set_progress_bar_config(disable=True)
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the warning of `convert` says
    noise = torch.Generator().manual_seed(5)
    theirs = pipe([0, 1], guidance_scale=2.0, generator=noise, num_inference_steps=5, output_type="pt").images
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    model = ConditionalModel(run.denoiser, torch.tensor([0, 1]), Guidance(scale=2.0))
    *_, x = Sampler(sampler="ddim", spacing="ddim", steps=5).path(model, x, torch.Generator())
    ours = run.representation.decode(x)
    assert ours.std() > 0.1
    assert (ours.abs() < 0.99).float().mean() > 0.5
    torch.testing.assert_close(2 * theirs - 1, ours, atol=1e-4, rtol=0)

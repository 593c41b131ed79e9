"""Settings that arrive with the right value, where only a closed form or a spy can tell; and what resuming may change.

test_every_key.py says that each key arrives at all.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from safetensors.torch import load_file
from test_every_key import keys_of
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mezzotint
from mezzotint.data import digits
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.denoising import denoise
from mezzotint.evaluation.end_to_end import FinetuneSettings, finetune_classifier
from mezzotint.evaluation.mae import MAESettings, train_mae
from mezzotint.evaluation.probing import probe
from mezzotint.evaluation.scores import mean_bits_per_dim
from mezzotint.interop import load as load_any
from mezzotint.recipe import Recipe, TrainingSettings, load_recipe, override_recipe
from mezzotint.samplers.likelihood import log_likelihood
from mezzotint.samplers.threshold import Thresholded
from mezzotint.training import loop
from mezzotint.training.ema import EMA
from mezzotint.training.finetune import choose_trainable
from mezzotint.training.run_folder import MAY_CHANGE, WITH_OVERRIDE
from mezzotint.training.tokenizers import fit_tokenizer

UNET = "backbone={name: unet, channels: [8, 8], resblocks: [1, 1], attention: [0, 1], middle: false, groups: 4}"
TWO_STEPS = (
    *TINY,
    "training.steps=2",
    "training.batch_size=4",
    "training.checkpoint_every=100",
    "training.log_every=1",
)


@contextmanager
def optimizer_steps() -> Iterator[list[dict[str, Any]]]:
    """Of every step of an optimizer: its groups, and its parameters before it, their gradients and what they became."""
    seen: list[dict[str, Any]] = []

    def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = parameters(optimizer)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]
        seen.append({"groups": groups, "before": [p.detach().clone() for p in own], "gradients": gradients})
        seen[-1]["kind"] = type(optimizer)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen[-1]["after"] = [p.detach().clone() for p in parameters(optimizer)]
        seen[-1]["states"] = [optimizer.state[p] for p in parameters(optimizer)]

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trained(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The optimizer's steps of a run."""
    with optimizer_steps() as seen:
        mezzotint.train(load_recipe("digits", [*TWO_STEPS, *overrides]), folder, quiet=True, device="cpu")
    return seen


# ---------------------------------------------------------------------------------------------------- the optimizer


def test_the_first_two_updates_are_adamw_s_by_hand(tmp_path: Path) -> None:
    """Loshchilov and Hutter, algorithm 2, in float64: learning rates of a warm-up, both betas, decoupled decay."""
    lr, (first, second), decay = 1e-2, (0.7, 0.8), 0.3
    steps = trained(
        tmp_path / "run",
        f"training={{lr: {lr}, betas: [{first}, {second}], weight_decay: {decay}, warmup_steps: 2, grad_clip: null}}",
    )
    assert len(steps) == 2
    m = [torch.zeros_like(p, dtype=torch.float64) for p in steps[0]["before"]]
    v = [torch.zeros_like(p) for p in m]
    for number, step in enumerate(steps, 1):
        rate = lr * number / 2
        for k, (before, gradient, after) in enumerate(
            zip(step["before"], step["gradients"], step["after"], strict=True)
        ):
            g = gradient.double()
            m[k] = first * m[k] + (1 - first) * g
            v[k] = second * v[k] + (1 - second) * g * g
            moved = (m[k] / (1 - first**number)) / ((v[k] / (1 - second**number)).sqrt() + 1e-8)
            expected = (1 - rate * decay) * before.double() - rate * moved
            torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_gradients_are_clipped_to_the_norm_that_is_set(tmp_path: Path, clip: float) -> None:
    free = trained(tmp_path / "free", "training.grad_clip=null")[0]["gradients"]
    norm = torch.stack([gradient.norm() for gradient in free]).norm()
    clipped = trained(tmp_path / "clipped", f"training.grad_clip={clip}")[0]["gradients"]
    for one, other in zip(clipped, free, strict=True):
        torch.testing.assert_close(one, other * min(1.0, clip / norm.item()), rtol=1e-4, atol=1e-9)


def test_averages_are_the_recursion_over_the_optimizer_s_weights(tmp_path: Path) -> None:
    """a ← d·a + (1 − d)·w, from the initial weights; with warm-up d is at most (1 + k) / (10 + k) after step k."""
    for warmup in (False, True):
        run = tmp_path / str(warmup)
        steps = trained(run, "training.ema=[0.9, 0.15]", f"training.ema_warmup={str(warmup).lower()}")
        names = [name for name, _ in mezzotint.load(run).denoiser.backbone.named_parameters()]
        for decay, file in ((0.9, "model"), (0.15, "model-ema-0.15")):
            saved = load_file(run / f"{file}.safetensors")
            average = [parameter.double() for parameter in steps[0]["before"]]
            for number, step in enumerate(steps, 1):
                d = min(decay, (1 + number) / (10 + number)) if warmup else decay
                average = [d * a + (1 - d) * w for a, w in zip(average, step["after"], strict=True)]
            for name, expected in zip(names, average, strict=True):
                torch.testing.assert_close(saved[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_state_space_parameters_have_their_own_rate_and_no_decay(tmp_path: Path) -> None:
    ssm = "backbone={name: diffussm, width: 16, depth: 1, patch_size: 2}"
    step = trained(tmp_path / "run", ssm, "training={lr: 1e-3, ssm_lr: 1e-4, weight_decay: 0.2}")[0]
    assert [(group["lr"], group["weight_decay"]) for group in step["groups"]] == [(1e-3, 0.2), (1e-4, 0.0)]


def test_bf16_is_the_network_s_alone(tmp_path: Path) -> None:
    """Products in bf16; weights, gradients, the optimizer's state, x_t and the loss stay float32."""
    products: set[torch.dtype] = set()
    losses: set[torch.dtype] = set()
    forward, linear = loop.Objective.forward, F.linear

    def spied(self: Any, *inputs: Any) -> dict[str, Tensor]:
        found = forward(self, *inputs)
        losses.add(found["loss"].dtype)
        return found

    def product(*inputs: Any, **more: Any) -> Tensor:
        made = linear(*inputs, **more)
        products.add(made.dtype)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Objective, "forward", spied)
        patch.setattr(F, "linear", product)
        [*_, step] = trained(tmp_path / "run", "training.precision=bf16")
    assert (products, losses) == ({torch.bfloat16}, {torch.float32})
    tensors = [
        *step["after"],
        *step["gradients"],
        *(s[key] for s in step["states"] for key in ("exp_avg", "exp_avg_sq")),
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- objectives


def objective(*overrides: str) -> Any:
    recipe = load_recipe("digits", [*TINY, "backbone.num_classes=10", *overrides])
    return loop.make_objective(recipe, mezzotint.build(recipe).denoiser)


def test_time_eps_is_the_margin_at_singular_ends() -> None:
    """A score is −ε/σ, singular at t = 0 alone; the likelihood weight on noise at both ends of the linear path."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    score = objective("target=score", "objective.time_eps=0.01").times
    assert score.quantile(ends).tolist() == pytest.approx([0.01, 1])
    both = objective("target=noise", "objective.weighting=likelihood", "objective.time_eps=0.02").times
    assert both.quantile(ends).tolist() == pytest.approx([0.02, 0.98])
    none = objective("target=velocity", "objective.time_eps=0.02").times
    assert none.quantile(ends).tolist() == [0, 1]


def test_logit_normal_times_and_a_single_level() -> None:
    times = objective("objective={times: logit-normal, time_mean: 0.5, time_std: 2}").times
    u = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # of a standard normal variable at 1
    found = times.quantile(torch.tensor([0.5, u], dtype=torch.float64))
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.5))])
    single = objective("objective={times: single, noise_level: 0.25}").times
    assert single.quantile(torch.rand(3)).tolist() == pytest.approx([0.2] * 3)  # σ/α = t/(1 − t)


def test_stratified_times_are_one_in_each_stratum() -> None:
    draw = objective("objective.stratified=true").draw(64, torch.Generator().manual_seed(0))
    assert (draw.t.sort().values * 64).floor().diff().tolist() == [1.0] * 63


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_condition_dropout_is_the_share_that_is_left_out(share: float) -> None:
    draw = objective(f"objective.condition_dropout={share}").draw(10_000, torch.Generator().manual_seed(0))
    assert draw.drop.double().mean().item() == pytest.approx(share, abs=0.02)


def test_the_bound_counts_vlb_weight_times() -> None:
    words = "interpolant={name: ddpm, num_steps: 50}", "target=noise", "variance=learned"
    found = objective(*words, "objective.vlb_weight=3")
    x, draw = torch.randn(4, 1, 8, 8), found.draw(4, torch.Generator().manual_seed(0))
    losses = found(x, torch.arange(4), draw)
    torch.testing.assert_close(losses["loss"], losses["mse"] + 3 * losses["vlb"])


# --------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_the_dynamic_threshold_is_numpy_s_quantile(pipeline: mezzotint.Pipeline, share: float) -> None:
    """Through the recipe's key: of |data| of each image, but at least 1."""
    words = {"sampler": "ode-euler", "steps": 2, "threshold": "dynamic", "threshold_quantile": share}
    clipped, clip = [], Thresholded._clipped

    def spied(self: Thresholded, data: Tensor) -> Tensor:
        clipped.append((data, clip(self, data)))
        return clipped[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Thresholded, "_clipped", spied)
        mezzotint.sample(pipeline, count=3, **words)
    for data, found in clipped:
        for one, other in zip(data.numpy(), found.numpy(), strict=True):
            limit = max(1.0, np.quantile(np.abs(one), share))
            np.testing.assert_allclose(other, np.clip(one, -limit, limit) / limit, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- LoRA


def adapters(seed: int, **lora: Any) -> dict[str, Tensor]:
    backbone = mezzotint.build(load_recipe("digits", [*TINY, "backbone.num_classes=10"])).denoiser.backbone
    choose_trainable(backbone, TrainingSettings.parse({"lora": {"rank": 2, **lora}}), seed)
    return {name: value for name, value in backbone.named_parameters() if ".lora_" in name}


def test_lora_is_drawn_from_the_run_s_seed() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    one = adapters(5)
    torch.manual_seed(1)
    again, other = adapters(5), adapters(6)
    for name, value in one.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == ("lora_B" in name), "B is zero, A is drawn"
    assert {value.shape[0] for name, value in one.items() if "lora_A" in name} == {2}


def test_lora_changes_a_weight_by_alpha_over_rank_times_b_a(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    mezzotint.train(load_recipe("digits", [*TWO_STEPS, "training.ema=[]"]), tmp_path / "run", quiet=True)
    words = "training.lora={rank: 2, alpha: 6, targets: [attn.qkv]}", "training.ema=[]", "training.lr=0.01"
    recipe = load_recipe("digits", [*TWO_STEPS, f"init={tmp_path / 'run'}", *words])
    mezzotint.train(recipe, tmp_path / "lora", quiet=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "lora"))
    matrices = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    name = "blocks.0.attn.qkv"
    a, b = (matrices[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
    change = after[f"{name}.weight"] - before[f"{name}.weight"]
    assert change.abs().max() > 0
    torch.testing.assert_close(change, 6 / 2 * b @ a)
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


# --------------------------------------------------------------------------------- tokenizers, classifiers, MAEs


def test_a_tokenizer_is_fitted_by_the_adam_that_is_set(tmp_path: Path) -> None:
    fit = "{steps: 4, lr: 0.02, betas: [0.6, 0.7], examples: 32, batch_size: 8}"
    words = f"representation={{name: patch-ae, stride: 2, channels: 2, fit: {fit}}}"
    with optimizer_steps() as steps:
        fit_tokenizer(load_recipe("digits", [*TINY, words]), tmp_path / "out", device="cpu", quiet=True)
    assert [step["groups"][0]["lr"] for step in steps] == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    )
    assert {step["groups"][0]["betas"] for step in steps} == {(0.6, 0.7)}


FINETUNE: dict[str, tuple[Any, Callable[[dict[str, Any]], Any], Any]] = {
    # key: a value, what of the run it decides, and that
    "epochs": (2, lambda seen: len(seen["steps"]), 8),
    "batch_size": (16, lambda seen: {len(x) for x in seen["inputs"]}, {16}),
    "lr": (0.01, lambda seen: max(group["initial_lr"] for group in seen["steps"][0]["groups"]), 0.01),
    "warmup": (0.9, lambda seen: seen["steps"][0]["groups"][-1]["lr"], None),
    "weight_decay": (0.3, lambda seen: {g["weight_decay"] for g in seen["steps"][0]["groups"]}, {0.0, 0.3}),
    "betas": ((0.5, 0.6), lambda seen: seen["steps"][0]["groups"][0]["betas"], (0.5, 0.6)),
    "layer_decay": (0.5, lambda seen: sorted({g["initial_lr"] for g in seen["steps"][0]["groups"]})[:2], None),
    "drop_path": (0.9, lambda seen: bool(seen["dropped"]), True),
    "label_smoothing": (0.3, lambda seen: {more["label_smoothing"] for more in seen["losses"]}, {0.3}),
    "mixup": (0.0, lambda seen: "MixUp" in seen["mixed"], False),
    "cutmix": (0.0, lambda seen: "CutMix" in seen["mixed"], False),
    "randaugment": (0, lambda seen: "RandAugment" in seen["changes"], False),
    "magnitude": (0, lambda seen: "RandAugment" in seen["changes"], False),
    "crop": (1.0, lambda seen: "RandomResizedCrop" in seen["changes"], False),
    "erase": (0.5, lambda seen: "RandomErasing" in seen["changes"], True),
    "ema": (None, lambda seen: seen["averages"], ()),
    "precision": ("bf16", lambda seen: {x.dtype for x in seen["features"]}, {torch.bfloat16}),
    "seed": (3, lambda seen: seen["metrics"]["epochs"][0]["loss"], None),
}


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Fine-tunes a tiny network as a classifier, and says what was seen of it."""
    recipe = load_recipe("digits", [*TINY, "backbone.depth=2", "backbone.num_classes=10", "data.flip=false"])
    known: dict[str, dict[str, Any]] = {}

    def run(**settings: Any) -> dict[str, Any]:
        made = FinetuneSettings.parse({"epochs": 1, "batch_size": 8, "drop_path": 0.0} | settings)
        if (key := made.model_dump_json()) in known:
            return known[key]
        seen: dict[str, Any] = {"inputs": [], "losses": [], "dropped": [], "mixed": "", "averages": (), "features": []}
        from mezzotint.evaluation import end_to_end

        entropy, forward, mixing, augmentation = (
            F.cross_entropy, end_to_end.Classifier.forward, end_to_end.mixing, end_to_end.augmentation
        )  # fmt: skip

        def loss(*inputs: Any, **more: Any) -> Tensor:
            seen["losses"].append(more)
            return entropy(*inputs, **more)

        def classify(self: Any, x: Tensor) -> Tensor:
            logits = forward(self, x)
            if self.training:
                seen["inputs"].append(x)
                seen["features"].append(logits)
            return logits

        def mixed(*given: Any) -> Any:
            found = mixing(*given)
            seen["mixed"] = repr([type(one).__name__ for one in getattr(found, "transforms", [])])
            return found

        def changes(*given: Any) -> Any:
            found = augmentation(*given)
            seen["changes"] = repr(found)
            return found

        class Averages(EMA[Any]):
            def __init__(self, module: Any, decays: Any, **more: Any) -> None:
                super().__init__(module, decays, **more)
                seen["averages"] = self.decays

        with pytest.MonkeyPatch.context() as patch, optimizer_steps() as steps:
            patch.setattr(F, "cross_entropy", loss)
            patch.setattr(end_to_end.Classifier, "forward", classify)
            patch.setattr(end_to_end, "mixing", mixed)
            patch.setattr(end_to_end, "augmentation", changes)
            patch.setattr(end_to_end, "EMA", Averages)
            patch.setattr(
                "torchvision.ops.stochastic_depth",
                lambda x, chance, mode, training: (seen["dropped"].append(chance), x)[1],
            )
            folder = tmp_path_factory.mktemp("classifiers") / "out"
            seen["metrics"] = finetune_classifier(mezzotint.build(recipe), folder, made, count=32, layers=2, quiet=True)
        known[key] = {**seen, "steps": steps}
        return known[key]

    return run


def test_the_table_of_fine_tuning_has_every_key() -> None:
    assert sorted(FINETUNE) == sorted(keys_of(FinetuneSettings))


@pytest.mark.parametrize("key", FINETUNE)
def test_fine_tuning_does_as_its_key_says(classified: Callable[..., dict[str, Any]], key: str) -> None:
    value, look, expected = FINETUNE[key]
    found = look(classified(**{key: value}))
    assert found != look(classified())
    assert expected is None or found == expected


def test_layers_learn_at_rates_that_decay(classified: Callable[..., dict[str, Any]]) -> None:
    """Of two blocks: the head lr, block 2 lr·d, block 1 lr·d², embeddings lr·d³."""
    rates = {group["initial_lr"] for group in classified(layer_decay=0.5, lr=0.08)["steps"][0]["groups"]}
    assert sorted(rates) == pytest.approx([0.01, 0.02, 0.04, 0.08])


MAE: dict[str, tuple[Any, Callable[[Any, list[dict[str, Any]]], Any], Any]] = {
    "depth": (1, lambda config, _: config.num_hidden_layers, 1),
    "decoder_depth": (3, lambda config, _: config.decoder_num_hidden_layers, 3),
    "decoder_width": (24, lambda config, _: config.decoder_hidden_size, 24),
    "decoder_heads": (4, lambda config, _: config.decoder_num_attention_heads, 4),
    "mask_ratio": (0.5, lambda config, _: config.mask_ratio, 0.5),
    "norm_pix_loss": (False, lambda config, _: config.norm_pix_loss, False),
    "lr": (0.01, lambda _, steps: max(step["groups"][0]["lr"] for step in steps), 0.01),
    "warmup": (0.5, lambda _, steps: [g["lr"] > 0 for g in steps[0]["groups"]] and steps[0]["groups"][0]["lr"], None),
    "weight_decay": (0.2, lambda _, steps: [g["weight_decay"] for g in steps[0]["groups"]], [0.2, 0.0]),
    "betas": ((0.5, 0.6), lambda _, steps: steps[0]["groups"][0]["betas"], (0.5, 0.6)),
    "crop": (1.0, lambda _, steps: steps[0]["gradients"][0].sum().item(), None),
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    transformers = pytest.importorskip("transformers")
    known: dict[str, Any] = {}

    def run(**settings: Any) -> Any:
        made = MAESettings.parse(settings)
        if (key := made.model_dump_json()) not in known:
            folder = tmp_path_factory.mktemp("mae") / "out"
            words = (*TINY, "training.steps=4", "training.batch_size=8", "backbone.depth=4", "backbone.width=32")
            with optimizer_steps() as steps:
                train_mae(load_recipe("digits", [*words]), folder, made, device="cpu")
            known[key] = transformers.AutoConfig.from_pretrained(folder), steps
        return known[key]

    return run


def test_the_table_of_masked_autoencoders_has_every_key() -> None:
    assert sorted(MAE) == sorted(keys_of(MAESettings))


@pytest.mark.parametrize("key", MAE)
def test_a_masked_autoencoder_does_as_its_key_says(masked: Callable[..., Any], key: str) -> None:
    value, look, expected = MAE[key]
    found = look(*masked(**{key: value}))
    assert found != look(*masked())
    assert expected is None or found == expected


# ------------------------------------------------------------------------------------- evaluation drops nothing out


DROPOUT = (UNET, "backbone.dropout=0.9")


@pytest.fixture
def dropping() -> mezzotint.Pipeline:
    """A network nine tenths of which are left out in training, as `build` gives it."""
    recipe = load_recipe("digits", [*TWO_STEPS, *DROPOUT, "backbone.num_classes=10"])
    pipeline = mezzotint.build(recipe, class_names=[*"0123456789"])
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return pipeline


def in_evaluation_alone(denoiser: torch.nn.Module) -> list[bool]:
    """Whether each call from now on is in training."""
    seen: list[bool] = []
    for module in denoiser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_pre_hook(lambda dropout, _: seen.append(dropout.training))
    return seen


@pytest.mark.parametrize("use", ["sample", "probe", "denoise", "likelihood"])
def test_what_looks_at_a_model_leaves_nothing_out(
    dropping: mezzotint.Pipeline, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = in_evaluation_alone(dropping.denoiser)
    found: Any
    monkeypatch.setattr("mezzotint.evaluation.scores.log_likelihood", partial(log_likelihood, rtol=0.5, atol=0.5))
    images, labels = digits("test").images[:2], digits("test").labels[:2]  # type: ignore[index]
    uses: dict[str, Callable[[], Any]] = {
        "sample": lambda: mezzotint.sample(dropping, count=2),
        "probe": lambda: probe(dropping, layers=[1], probes=["knn"], count=40, cache=False)["rows"],
        "denoise": lambda: denoise(dropping, images / 127.5 - 1, 0.3)[1],
        "likelihood": lambda: mean_bits_per_dim(dropping, images, labels),
    }
    torch.manual_seed(0)
    found = uses[use]()
    torch.manual_seed(1)
    again = uses[use]()
    assert torch.equal(found, again) if isinstance(found, Tensor) else found == again
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("ema", ["[]", "[0.9]"])
def test_validation_and_grids_of_a_run_leave_nothing_out_and_training_goes_on_to(tmp_path: Path, ema: str) -> None:
    """Without averages the network that is shown is the one that is trained."""
    seen: list[tuple[str, bool]] = []
    inside: list[str] = ["training"]
    forward = torch.nn.Dropout.forward

    def spied(self: Any, x: Tensor) -> Tensor:
        seen.append((inside[-1], self.training))
        return forward(self, x)

    def within(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **more: Any) -> Any:
            inside.append(name)
            try:
                return call(*given, **more)
            finally:
                inside.pop()

        return wrapped

    recipe = load_recipe(
        "digits", [*TWO_STEPS, *DROPOUT, f"training={{ema: {ema}, validate_every: 1, sample_every: 1}}"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", spied)
        patch.setattr(loop, "validation_loss", within("validation", loop.validation_loss))
        patch.setattr(loop, "sample", within("grid", loop.sample))
        pipeline = mezzotint.train(recipe, tmp_path / "run", quiet=True, device="cpu")
    assert set(seen) == {("training", True), ("validation", False), ("grid", False)}
    for loaded in (pipeline, mezzotint.load(tmp_path / "run"), load_any(tmp_path / "run")):
        assert not any(module.training for module in loaded.denoiser.modules())


# -------------------------------------------------------------------------------------- random rows of each process


def test_dropout_resumes_with_the_same_weights_and_leaves_the_caller_s_numbers(tmp_path: Path) -> None:
    words = [*TWO_STEPS, *DROPOUT, "training.steps=4", "training.checkpoint_every=2", "training.ema=[]"]
    torch.manual_seed(0)
    mezzotint.train(load_recipe("digits", words), tmp_path / "whole", quiet=True, device="cpu")
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(0)))
    mezzotint.train(load_recipe("digits", [*words, "training.steps=2"]), tmp_path / "run", quiet=True, device="cpu")
    torch.manual_seed(7)
    mezzotint.train(load_recipe("digits", words), tmp_path / "run", quiet=True, device="cpu", resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Stretched:
    """A representation that draws, without an autoencoder: x = image + ε/2."""

    stochastic = True

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        return images if eps is None else images + eps / 2

    def decode(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)


def dump(folder: Path) -> None:
    """Two steps of this process among others; what it drew goes to FOLDER/RANK.pt."""
    drawn: dict[str, list[Tensor]] = {"masks": [], "t": [], "eps": [], "drop": [], "flips": [], "latents": []}
    dropout, forward, mirror, encode = (
        torch.nn.Dropout.forward, loop.Objective.forward, loop.flip, Stretched.encode
    )  # fmt: skip

    def masked_out(self: Any, x: Tensor) -> Tensor:
        found = dropout(self, torch.ones_like(x))
        drawn["masks"].append(found)
        return x * found

    def objective(self: Any, x: Tensor, y: Any, draw: Any) -> Any:
        for name, value in zip(("t", "eps", "drop"), draw, strict=True):
            drawn[name].append(value)
        return forward(self, x, y, draw)

    def flipped(images: Tensor, which: Tensor) -> Tensor:
        drawn["flips"].append(which)
        return mirror(images, which)

    def encoded(self: Any, images: Tensor, eps: Tensor | None = None) -> Tensor:
        assert eps is not None
        drawn["latents"].append(eps)
        return encode(self, images, eps)

    words = [*TWO_STEPS, *DROPOUT, "data.flip=true", "training.batch_size=32", "objective.condition_dropout=0.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", masked_out)
        patch.setattr(loop.Objective, "forward", objective)
        patch.setattr(loop, "flip", flipped)
        patch.setattr(Stretched, "encode", encoded)
        patch.setattr("mezzotint.pipeline.representation", lambda *_, **__: Stretched())
        mezzotint.train(load_recipe("digits", words), folder / "run", quiet=True, device="cpu")
    torch.save(drawn, folder / f"{os.environ.get('RANK', '0')}.pt")


def test_every_process_draws_rows_of_its_own(tmp_path: Path) -> None:
    """Of two processes each has its half of what one draws; but masks of dropout, which are each one's own."""
    (tmp_path / "one").mkdir()
    dump(tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(f"from pathlib import Path\nfrom test_right_values import dump\ndump(Path({str(tmp_path)!r}))\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, first, second = (torch.load(tmp_path / name) for name in ("one/0.pt", "0.pt", "1.pt"))
    for name in ("t", "eps", "drop", "flips", "latents"):
        for all_rows, upper, lower in zip(whole[name], first[name], second[name], strict=True):
            assert torch.equal(all_rows, torch.cat([upper, lower])), name
            assert not torch.equal(upper, lower), name
    for number, (upper, lower) in enumerate(zip(first["masks"], second["masks"], strict=True)):
        assert not torch.equal(upper, lower)
        assert not torch.equal(upper, first["masks"][number - 1])


# --------------------------------------------------------------------------------------------- what resuming may do

#: of every key of `training`: another value, and whether a resumed run may have it
RESUMED: dict[str, tuple[str, str]] = {
    "steps": ("8", "yes"),
    "batch_size": ("8", "no"),
    "accumulate": ("2", "no"),
    "lr": ("1e-5", "override"),
    "lr_schedule": ("cosine", "no"),
    "warmup_steps": ("1", "no"),
    "weight_decay": ("0.5", "no"),
    "ssm_lr": ("1e-5", "no"),
    "betas": ("[0.5, 0.6]", "no"),
    "grad_clip": ("0.5", "override"),
    "precision": ("bf16", "override"),
    "compile": ("true", "override"),
    "freeze": ("[blocks]", "no"),
    "ema": ("[0.25]", "override"),
    "ema_warmup": ("true", "no"),
    "log_every": ("1", "yes"),
    "validate_every": ("2", "yes"),
    "sample_every": ("2", "yes"),
    "checkpoint_every": ("1", "yes"),
    "keep_checkpoints": ("1", "yes"),
    "lora.rank": ("2", "no"),
    "lora.alpha": ("8", "no"),
    "lora.targets": ("[attn.qkv]", "no"),
}
#: and of the rest of a recipe what is not refused
FREE = {
    "data.workers": "1",
    "sampling.steps": "7",
    "guidance.scale": "2",
    "description": "x",
}
REFUSED = {
    "seed": "1",
    "target": "noise",
    "objective.time_eps": "0.01",
    "objective.condition_dropout": "0.2",
    "interpolant.snr_divisor": "2",
    "backbone.mlp_ratio": "2",
    "data.flip": "true",
    "time_input": "[100, 0]",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run of four steps at a constant rate; what may be of a schedule's is in test_resume.py."""
    run = tmp_path_factory.mktemp("begun") / "run"
    words = ("training.steps=4", "training.ema=[0.5]", "training.ema_warmup=false", "training.grad_clip=null")
    recipe = load_recipe("digits", [*TWO_STEPS, *words, "data.flip=false"])
    mezzotint.train(recipe, run, quiet=True, device="cpu")
    return recipe, run


class FarEnough(Exception):
    """What comes after the recipes were compared."""


def accepts(recipe: Recipe, run: Path, change: str, **options: bool) -> bool:
    """Whether the run may be resumed so; nothing is trained, and nothing written."""

    def stop(*_: Any, **__: Any) -> None:
        raise FarEnough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Checkpoints", stop)
        with pytest.raises((MezzotintError, FarEnough)) as stopped:
            mezzotint.train(override_recipe(recipe, [change]), run, resume=True, quiet=True, device="cpu", **options)
    accepted = stopped.type is FarEnough
    assert accepted or change.partition("=")[0] in str(stopped.value)
    return accepted


def test_the_table_of_resuming_has_every_key_of_training() -> None:
    own = {key for key in keys_of(TrainingSettings) if not key.startswith("stages.")}
    assert set(RESUMED) == own
    allowed = {key for key, (_, answer) in RESUMED.items() if answer == "yes"}
    assert {f"training.{key}" for key in allowed} == {key for key in MAY_CHANGE if key.startswith("training.")}
    assert {f"training.{key}" for key, (_, answer) in RESUMED.items() if answer == "override"} == set(WITH_OVERRIDE)


@pytest.mark.parametrize("key", RESUMED)
def test_a_resumed_run_may_change_this_and_nothing_else(begun: tuple[Recipe, Path], key: str) -> None:
    value, answer = RESUMED[key]
    recipe, run = begun
    if key.startswith("lora."):
        recipe = override_recipe(recipe, [f"init={run}"])  # without which LoRA means nothing, and it is refused itself
    change = f"training.{key}={value}"
    assert accepts(recipe, run, change) == (answer == "yes")
    assert accepts(recipe, run, change, override=True) == (answer != "no")
    assert accepts(recipe, run, change, data_changed=True) == (answer == "yes")


@pytest.mark.parametrize("key", [*FREE, *REFUSED])
def test_what_else_a_resumed_run_may_change(begun: tuple[Recipe, Path], key: str) -> None:
    recipe, run = begun
    assert accepts(recipe, run, f"{key}={(FREE | REFUSED)[key]}", override=True) == (key in FREE)

"""The training loop: one function, from the recipe to the run folder."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mezzotint.conditions import Condition, Text
from mezzotint.conditions.text import Captioner
from mezzotint.data import (
    Batch,
    BatchOrder,
    CachedLatents,
    CaptionedDataset,
    ImageDataset,
    ImageStream,
    check_captions,
    iterate_batches,
)
from mezzotint.data.transforms import flip
from mezzotint.denoiser import Denoiser
from mezzotint.errors import MezzotintError
from mezzotint.files import atomic_path, is_utf8, parse_json
from mezzotint.finite import nonfinite
from mezzotint.images import save_grid, save_video
from mezzotint.objectives import Objective
from mezzotint.pipeline import (
    Pipeline,
    build,
    captioner,
    check_sampling,
    choose_labels,
    label_names,
    sample,
    save_weights,
)
from mezzotint.progress import console, progress_bar
from mezzotint.randomness import generator_for, mix
from mezzotint.recipe import (
    Overrides,
    Recipe,
    TrainingSettings,
    advice,
    as_recipe,
    load_recipe,
    override_recipe,
    resolve,
)
from mezzotint.representations import TOKENIZERS, Encoder, KLAutoencoder, PatchPCA, PyramidEncoder
from mezzotint.representations.image_space import FullBasisEncoder
from mezzotint.training.checkpoints import Checkpoints
from mezzotint.training.ema import EMA
from mezzotint.training.finetune import choose_trainable, merged, save_adapter, start_from, take_classes
from mezzotint.training.parallel import World, locked_by, world
from mezzotint.training.run_folder import TrainedOn, check_is_run, check_run, flat, resume_command
from mezzotint.training.tokenizers import check_latents, own_tokenizer
from mezzotint.weightings import TimeDistribution, single_level, time_distribution, training_range, weighting

logger = logging.getLogger("mezzotint")

VALIDATION_EXAMPLES = 2048
EXAMPLE_CAPTIONS = 64
# Streams of random numbers, told apart by the second argument of `generator_for`; 3 and 4 are LoRA's and tokenizers'.
TRAINING, VALIDATION, DROPOUT = 1, 2, 5


def train(
    recipe: Recipe | str | Path,
    run: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    quiet: bool = False,
    trust_code: bool = False,
    override: bool = False,
    data_changed: bool = False,
) -> Pipeline:
    """Train `recipe` into the folder `run` and return the pipeline with its averaged (EMA) weights.

    The folder gets recipe.yaml (resolved), model.safetensors (the first EMA; further decays as model-ema-<decay>),
    state/ (checkpoints), logs/ (TensorBoard, and metrics.jsonl), samples/, adapter/ with LoRA, and tokenizer/, which is
    copied or fitted first. With `resume`, training goes on from the newest whole checkpoint and ends with the very
    weights of an uninterrupted run. Started by torchrun, the global batch is shared by all processes. Ctrl-C or SIGTERM
    saves a checkpoint and raises `KeyboardInterrupt`. override: the resumed run may change training.lr, grad_clip,
    precision, compile and ema, and the end of a decay that it is in; data_changed: and its data set. record.json says
    what it was trained on, and what was changed at which step. trust_code: import the module:function that the recipe
    may name, and resume states that another user wrote.

    Raises `MezzotintError` for a folder that holds another run, fewer steps than a resumed one has made, data that do
    not fit, a non-finite loss, a full disk.
    """
    recipe = as_recipe(recipe)
    settings, run = recipe.training, Path(run)
    if not is_utf8(run):
        raise MezzotintError(f"{run} is not in UTF-8, as TensorBoard's logs need it; choose another name")
    with ExitStack() as stack:
        here = stack.enter_context(world(device))
        stack.enter_context(locked_by(here, run))
        plan = settings.plan()
        for stage in plan:
            if stage.settings.batch_size % (here.size * settings.accumulate):
                raise MezzotintError(
                    f"training.batch_size {stage.settings.batch_size} is not divisible by {here.size} process(es) × "
                    f"{settings.accumulate} micro-batch(es)"
                )

        # ---------------------------------------------------------------------------------- data, model, optimizer
        asked, recipe = recipe.data, recipe.settled()
        train_set = recipe.data.load("train")
        test_set = recipe.data.load("test") if settings.validate_every else None
        if recipe.init is not None:
            recipe = take_classes(recipe, train_set.class_names)
        text = recipe.condition.name == "text"
        if text:
            check_captions(train_set)
        reader = captioner(recipe, here.device) if text else None
        recipe = resolve(recipe, train_set, None if reader is None else reader.width)
        if here.is_main and not quiet and (taken := asked.taken(recipe.data)):
            console.print(f"taken from the data ({_counted(train_set)}): {taken}", soft_wrap=True)
        for sentence in advice(recipe, train_set) if here.is_main and not resume else ():
            logger.warning("%s", sentence)
        data = TrainedOn.of(recipe, train_set, reader)
        begun = check_run(run, recipe, data, here, resume=resume, override=override, data_changed=data_changed)
        checkpoints = Checkpoints(run / "state", here, settings.keep_checkpoints, trust_code=trust_code)
        step = (checkpoints.latest() or 0) if resume else 0
        if (note := begun.check_length(settings, step, override=override)) and here.is_main:
            logger.warning("%s", note)
        if resume and not step and here.is_main:
            logger.warning("%s has no whole checkpoint: training begins at its first step", run)
        pipeline = build(recipe, class_names=train_set.class_names, device=here.device)
        if recipe.init is not None and not step:  # a checkpoint of this run has its own weights; init may be gone
            for note in start_from(recipe.init, pipeline):
                if here.is_main:
                    logger.warning("%s: %s", recipe.init, note)
        if reader is not None:
            pipeline.captioner = reader
            pipeline.prompts = example_captions(train_set)
        denoiser = pipeline.denoiser.train()
        trained = choose_trainable(denoiser.backbone, settings, recipe.seed)
        if settings.sample_every:
            check_sampling(pipeline)
        mirror = train_set.mirror if isinstance(train_set, CachedLatents) else flip
        ema = EMA(denoiser, settings.ema, warmup=settings.ema_warmup)
        averaged = Pipeline(recipe, ema.modules[0] if ema.modules else denoiser, pipeline.class_names, pipeline.prompts)
        if reader is not None:
            averaged.captioner = reader
        backbone = denoiser.backbone
        if settings.compile:
            backbone.compile()
        null = pipeline.no_caption if text else None
        objectives = [make_objective(recipe, denoiser, stage.levels, null, stage.times) for stage in plan]
        if recipe.representation.name in TOKENIZERS:
            pipeline.recipe = averaged.recipe = own_tokenizer(recipe, run, here, quiet=quiet, trust_code=trust_code)
            check_latents(train_set, pipeline.recipe)
        # Cached latents are their own encoder: the autoencoder is needed to show samples, and then had better be there.
        encoder = encoder_of(train_set, pipeline)
        if not isinstance(train_set, CachedLatents) or settings.sample_every:
            averaged.representation = pipeline.representation  # an autoencoder need not be in memory twice
        base = getattr(encoder, "base", encoder)
        autoencoder = base if isinstance(base, KLAutoencoder) else None
        if autoencoder is not None:
            begun.check_autoencoder(autoencoder)
        if denoiser.space is not None:
            averaged.representation = pipeline.representation
            pipeline.connect()
            averaged.connect()
        optimizer = torch.optim.AdamW(
            parameter_groups(backbone, settings),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=here.device.type in ("cpu", "cuda"),
        )
        start_states(optimizer)
        drops = any(isinstance(module, nn.Dropout) and module.p for module in backbone.modules())
        if drops:  # draws from torch's global generators, which are the caller's
            stack.enter_context(torch.random.fork_rng([here.device] if here.device.type == "cuda" else []))
        autocast = torch.autocast(here.device.type, torch.bfloat16, enabled=settings.precision == "bf16")

        # -------------------------------------------------------------------------------------------------- resume
        interrupted = stack.enter_context(catch_signals())
        if step:
            state = training_state(denoiser, optimizer, ema)
            decays = begun.decays_at(step, settings.ema)
            saved = ema.saved_under(decays)
            # The averages are filled in place; of none there is an empty list in the checkpoint, and has to be here.
            step = checkpoints.load(step, {**state, "ema": saved if decays else []})
            if bad := _poisoned(state):
                raise MezzotintError(
                    f"{checkpoints.path(step)} holds NaN or infinite numbers ({bad}); remove it to go on from the "
                    "checkpoint before"
                )
            set_state_dict(backbone, optimizer, model_state_dict=state["backbone"], optim_state_dict=state["optimizer"])
            ema.start_others(denoiser, saved)
        if here.is_main:  # only now: whatever means nothing has failed, and left no folder behind
            begun.write(recipe, step, autoencoder)
        log = stack.enter_context(Log(run / "logs", step, recipe, pipeline.class_names, here, quiet=quiet))
        if here.is_main and not quiet:
            console.print(_beginning(run, step, settings.steps, trained), soft_wrap=True)

        def check(finished: int) -> list[float]:
            """The global losses of the pending steps up to `finished` as numbers; a non-finite one stops the run.

            So does the norm of a step's gradients, where they are clipped and it is known.
            """
            count = len(losses)
            values = here.mean(torch.stack([*losses, *norms])).tolist() if losses else []
            for number, step in enumerate(range(finished - count, finished)):
                for what, value in zip(("loss", "gradients' norm"), values[number::count], strict=False):
                    if not math.isfinite(value):
                        raise _diverged(what, value, step, order.indices(step - first), checkpoints)
            return values[:count]

        def good_state(step: int) -> dict[str, Any]:
            """The state after `step` steps; what the last of them made of it shows in no loss yet."""
            state = training_state(denoiser, optimizer, ema)
            if here.any(bool(bad := _poisoned(state))):
                raise MezzotintError(
                    f"step {step} made NaN or infinite numbers ({bad or 'on another process'}), although its loss is "
                    f"finite; {_way_on(checkpoints)}"
                )
            return state

        def save(step: int, state: dict[str, Any]) -> None:
            checkpoints.save(step, state)
            if here.is_main:
                export(averaged, ema, run, step)

        # ---------------------------------------------------------------------------------------------------- loop
        # This process's losses, and its gradients' norms, since the last log line, still on the device.
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        for number, stage in enumerate(plan):
            own, first = stage.settings, stage.first
            if step >= first + own.steps:
                continue
            objective = objectives[number]
            parallel_objective = here.wrap(objective, partial=stage.levels is not None)
            # A stage goes through the data in an order of its own; the first one's is that of a run without stages.
            order = BatchOrder.over(train_set, own.batch_size, mix(recipe.seed, number) if number else recipe.seed)
            batches = iterate_batches(
                train_set,
                order,
                start_step=step - first,
                stop_step=own.steps,
                rank=here.rank,
                world_size=here.size,
                workers=recipe.data.workers,
                captions=text,
            )
            share = own.batch_size // here.size
            micro = share // settings.accumulate
            mine = slice(here.rank * share, (here.rank + 1) * share)
            for batch in batches:
                # Every random number of a step comes from (seed, step), drawn for the global batch and then sliced:
                # what a step does depends neither on the steps before it nor on the number of processes.
                generator = generator_for(recipe.seed, TRAINING, step, device=here.device)
                flips = torch.rand(own.batch_size, generator=generator, device=here.device)[mine] < 0.5
                draw = objective.draw(own.batch_size, generator).rows(mine)
                images, y = to_device(batch, here.device, reader)
                if recipe.data.flip:
                    images = mirror(images, flips)
                latent_eps = None
                if encoder.stochastic:
                    shape = (own.batch_size, *denoiser.level_shapes[-1])
                    latent_eps = torch.randn(shape, generator=generator, device=here.device)[mine]
                x = encoder.encode(images, latent_eps)

                if drops:  # the masks alone are each process's own
                    torch.manual_seed(mix(recipe.seed, DROPOUT, step, here.rank))
                set_lr(optimizer, own, step - first)
                loss = torch.zeros((), device=here.device)
                for k in range(settings.accumulate):
                    rows = slice(k * micro, (k + 1) * micro)
                    last = k == settings.accumulate - 1
                    with nullcontext() if last or here.size == 1 else parallel_objective.no_sync(), autocast:  # type: ignore[operator]
                        found = parallel_objective(x[rows], None if y is None else y[rows], draw.rows(rows))
                        part = found["loss"].mean() / settings.accumulate
                        part.backward()
                    loss += part.detach()
                if settings.grad_clip is not None:
                    norms.append(torch.nn.utils.clip_grad_norm_(backbone.parameters(), settings.grad_clip))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                ema.update(denoiser, step)
                losses.append(loss)

                finished = step == settings.steps
                due = finished or step % settings.log_every == 0 or step == first + own.steps
                # A signal reaches the processes at different steps; they agree on when to stop where they meet anyway.
                stop = interrupted() if here.size == 1 else due and here.any(interrupted())
                save_now = finished or stop or step % settings.checkpoint_every == 0
                validate_now = settings.validate_every > 0 and (finished or step % settings.validate_every == 0)
                show_now = settings.sample_every > 0 and (finished or step % settings.sample_every == 0)
                if due or save_now or validate_now or show_now:
                    values = check(step)
                if due or save_now:
                    losses.clear()
                    norms.clear()
                    log.losses(step, values, optimizer.param_groups[0]["lr"], own.batch_size)
                log.advance(step)
                state = good_state(step) if save_now else {}
                if test_set is not None and validate_now and here.is_main:
                    with evaluating(averaged.denoiser):
                        validation = validation_loss(recipe, averaged, test_set, stage.levels)
                    if math.isfinite(validation):
                        log.scalar(step, "loss/validation", validation)
                    else:
                        logger.warning(
                            "the validation loss is %s at step %d; look at the held-out data", validation, step
                        )
                if show_now and here.is_main:
                    with evaluating(averaged.denoiser):
                        log.grid(step, averaged, run / "samples", stage.levels)
                if save_now:
                    save(step, state)
                if stop and not finished:
                    raise KeyboardInterrupt
        if not log.saw_steps and here.is_main:  # resumed after the end: make sure that the weights are there
            export(averaged, ema, run, step)
    averaged.denoiser.backbone = merged(averaged.denoiser.backbone).to(here.device)
    averaged.denoiser.eval()
    return averaged


def resume(
    run: str | Path,
    overrides: Overrides = (),
    *,
    steps: int | None = None,
    device: str = "auto",
    quiet: bool = False,
    trust_code: bool = False,
    override: bool = False,
    data_changed: bool = False,
) -> Pipeline:
    """Go on with the run folder `run` by its own recipe, from its newest whole checkpoint, and return its pipeline.

    overrides: as to `load_recipe`, what a resumed run may change (docs/resuming.md). steps: training.steps, in all;
    with more than before a finished run is trained longer, and a decay of its learning rate is the one over so many
    steps. The others are as for `train`. Raises `MezzotintError` where `run` is no run folder, and as `train` does.
    """
    check_is_run(run)
    recipe = load_recipe(run, overrides)
    if steps is not None:
        recipe = override_recipe(recipe, {"training.steps": steps})
    return train(
        recipe,
        run,
        resume=True,
        device=device,
        quiet=quiet,
        trust_code=trust_code,
        override=override,
        data_changed=data_changed,
    )


def make_objective(
    recipe: Recipe,
    denoiser: Denoiser,
    levels: int | None = None,
    null: Text | None = None,
    times_of_stage: Mapping[str, Any] | None = None,
) -> Objective:
    """The recipe's training objective for this denoiser, of the first `levels` of a pyramid (None: of all).

    null: the empty caption, where the condition is captions. times_of_stage: in place of the recipe's, `StagePlan`'s.
    """
    settings, path = recipe.objective.model_copy(update=times_of_stage), denoiser.interpolant
    weights = weighting(settings.weighting, min_snr_gamma=settings.min_snr_gamma)
    t_min, t_max = training_range(path, denoiser.target, weights, settings.time_eps)
    times = settings.times
    if times == "auto":
        times = "uniform" if path.num_steps is None else "discrete"
    if denoiser.learned_variance and times != "discrete":
        raise MezzotintError(f"a learned variance trains on whole steps: objective.times must be discrete, not {times}")
    distribution: TimeDistribution
    if times == "single":
        distribution = single_level(path, settings.noise_level)
    else:
        distribution = time_distribution(
            times,
            t_min=t_min,
            t_max=t_max,
            num_steps=path.num_steps,
            mean=settings.time_mean,
            std=settings.time_std,
        )
    return Objective(
        denoiser,
        weighting=weights,
        times=distribution,
        condition_dropout=settings.condition_dropout,
        null=null,
        level_weights=(settings.level_weights or (1.0,) * len(denoiser.level_shapes))[:levels],
        level_shares=settings.level_shares[:levels] if levels is None else (),
        stratified=settings.stratified,
        vlb_weight=settings.vlb_weight,
        residual_weight=settings.residual_weight,
    )


def to_device(
    batch: Batch, device: torch.device, captioner: Captioner | None = None
) -> tuple[Tensor, Condition | None]:
    """Images and labels, or captions as `captioner` reads them, on the device, without waiting for the copy."""
    y: Condition | None = None
    if captioner is not None:
        assert batch.captions is not None
        y = captioner.encode(batch.captions).to(device)
    elif batch.labels is not None:
        y = batch.labels.to(device, non_blocking=True)
    return batch.images.to(device, non_blocking=True), y


def encoder_of(dataset: ImageDataset | ImageStream, pipeline: Pipeline) -> Encoder:
    """What makes x of the data set's batches, of the original image all components (`FullBasisEncoder`)."""
    if pipeline.recipe.objective.residual_weight:
        if isinstance(dataset, CachedLatents):
            raise MezzotintError(
                "objective.residual_weight is on what latents leave out, which cached ones do not have; train on images"
            )
        return FullBasisEncoder(cast(PatchPCA, pipeline.representation))
    if not isinstance(dataset, CachedLatents):
        return pipeline.representation
    shapes = pipeline.denoiser.level_shapes
    return dataset if len(shapes) == 1 else PyramidEncoder(dataset, shapes)


def example_captions(dataset: ImageDataset | ImageStream) -> tuple[str, ...]:
    """Up to `EXAMPLE_CAPTIONS` different ones, from all over the data set: what a model shows when it is not asked."""
    if isinstance(dataset, ImageStream):
        order = BatchOrder.over(dataset, EXAMPLE_CAPTIONS)
        batch = next(iterate_batches(dataset, order, start_step=0, stop_step=1, captions=True))
        return tuple(dict.fromkeys(batch.captions or ()))
    if not isinstance(dataset, CaptionedDataset) or not dataset.has_captions:
        found = list(dataset.class_names)
    else:
        numbers = _spread(len(dataset), 4 * EXAMPLE_CAPTIONS)
        found = list(dict.fromkeys(options[0] for options in dataset.captions(numbers)))
    return tuple(found[i] for i in _spread(len(found), EXAMPLE_CAPTIONS))


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly."""
    return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).long().tolist()


def parameter_groups(backbone: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """AdamW's groups: what is trained; apart from it, what a `ssm_parameters` in it names."""
    ssm = {id(p) for module in backbone.modules() for p in getattr(module, "ssm_parameters", tuple)()}
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    own = {"weight_decay": 0.0} | ({} if settings.ssm_lr is None else {"initial_lr": settings.ssm_lr})
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) not in ssm]},
        {"params": [parameter for parameter in trained if id(parameter) in ssm], **own},
    ]
    return [group for group in groups if group["params"]]


def start_states(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that AdamW starts it with at its first step.

    A stage may leave some without a step; torch's checkpoints are of all or of none.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
            device = parameter.device if group["fused"] else "cpu"
            state = (torch.zeros((), dtype=torch.float32, device=device), *zeros)
            optimizer.state[parameter] = dict(zip(("step", "exp_avg", "exp_avg_sq"), state, strict=True))


def set_lr(optimizer: torch.optim.Optimizer, settings: TrainingSettings, step: int) -> None:
    """Set the learning rate of the step that follows `step` finished ones."""
    scale = settings.lr_scale(step)
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", settings.lr) * scale


def training_state(denoiser: Denoiser, optimizer: torch.optim.Optimizer, ema: EMA[Denoiser]) -> dict[str, Any]:
    """Everything that the next step depends on; data order and random numbers are functions of the step."""
    backbone, optimizer_state = get_state_dict(denoiser.backbone, optimizer)
    return {
        "backbone": backbone,
        "optimizer": optimizer_state,
        "ema": ema.averages,
    }


def export(pipeline: Pipeline, ema: EMA[Denoiser], run: Path, step: int) -> None:
    """Write model.safetensors (the first average, or the weights themselves without one) and the further averages.

    LoRA is merged into them; adapter/ holds that of model.safetensors alone.
    """
    metadata = {"step": str(step), **pipeline.header}
    backbone = pipeline.denoiser.backbone
    save_weights(merged(backbone), run / "model.safetensors", metadata)
    save_adapter(backbone, run / "adapter", pipeline.recipe.init)
    for decay, average in list(zip(ema.decays, ema.modules, strict=True))[1:]:
        save_weights(merged(average.backbone), run / f"model-ema-{decay}.safetensors", metadata)


@torch.no_grad()
def validation_loss(
    recipe: Recipe, pipeline: Pipeline, dataset: ImageDataset | ImageStream, levels: int | None = None
) -> float:
    """The objective's mean over (up to 2,048 of) the held-out examples, with the same noise every time."""
    reader = pipeline.captioner if pipeline.denoiser.text else None
    objective = make_objective(recipe, pipeline.denoiser, levels, None if reader is None else pipeline.no_caption)
    encoder = encoder_of(dataset, pipeline)
    count = VALIDATION_EXAMPLES if isinstance(dataset, ImageStream) else min(len(dataset), VALIDATION_EXAMPLES)
    batch_size = min(256, count)
    order = BatchOrder.over(dataset, batch_size, 0)
    batches = iterate_batches(dataset, order, start_step=0, stop_step=count // batch_size, captions=reader is not None)
    losses = []
    for step, batch in enumerate(batches):
        generator = generator_for(0, VALIDATION, step, device=pipeline.device)
        images, y = to_device(batch, pipeline.device, reader)
        x = encoder.encode(images)
        losses.append(objective(x, y, objective.draw(len(x), generator))["loss"])
    return torch.cat(losses).mean().item()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode; without averages it is the one that is trained, and then goes on as it was."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def _poisoned(state: dict[str, Any]) -> str | None:
    """The name of the first tensor of a training state that holds NaN or an infinity."""
    found = flat({**state, "ema": {str(number): average for number, average in enumerate(state["ema"])}})
    return nonfinite({name: value for name, value in found.items() if isinstance(value, Tensor)})


def _diverged(what: str, value: float, step: int, examples: Tensor, checkpoints: Checkpoints) -> MezzotintError:
    listed = ", ".join(map(str, examples[:16].tolist()))
    listed += f", … ({len(examples)} in all)" if len(examples) > 16 else ""
    return MezzotintError(
        f"the {what} became {value} at step {step + 1} (examples {listed}); {_way_on(checkpoints)}, or look at those "
        "examples"
    )


def _way_on(checkpoints: Checkpoints) -> str:
    last = checkpoints.latest()
    good = f"the last good checkpoint is {checkpoints.path(last)}" if last else "there is no checkpoint yet"
    return (
        f"{good}. Lower training.lr or set training.grad_clip ({resume_command(checkpoints.folder.parent)} KEY=VALUE "
        "--override)"
    )


def _counted(dataset: ImageDataset | ImageStream) -> str:
    """How many images there are, and of which classes."""
    names = dataset.class_names
    of = f"{len(names)} classes, {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "no classes"
    return f"{len(dataset):,} images to train on, {of}" if isinstance(dataset, ImageDataset) else of


def _beginning(run: Path, step: int, steps: int, trained: str) -> str:
    if not step:
        return trained
    if step < steps:
        return f"resuming {run} at step {step:,} of {steps:,}, {trained}"
    longer = f"{resume_command(run)} --steps {2 * steps}"
    return f"{run} is finished: it has made its {step:,} steps; to train it longer: {longer}"


@contextmanager
def catch_signals() -> Iterator[Any]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came. A second Ctrl-C interrupts at once."""
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, remember)
        except ValueError:  # not the main thread: the caller's signals are the caller's
            break
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """Loss, learning rate and images per second to the terminal, TensorBoard and metrics.jsonl; on the main process.

    TensorBoard also has the recipe, as text and as hyper-parameters with the losses for metrics, the classes' names and
    the sample grids.
    """

    def __init__(
        self, folder: Path, step: int, recipe: Recipe, class_names: Sequence[str], here: World, *, quiet: bool
    ) -> None:
        self.folder, self.first_step, self.settings = folder, step, recipe.training
        self.recipe, self.class_names = recipe, class_names
        self.active, self.quiet = here.is_main, quiet
        self.saw_steps = self.failed = False
        self.metrics = folder / "metrics.jsonl"

    def __enter__(self) -> Log:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self.folder.mkdir(parents=True, exist_ok=True)
            self._forget_later_steps()
            self.writer = SummaryWriter(str(self.folder), purge_step=self.first_step + 1 if self.first_step else None)
            with self._written():
                self._describe()
            self.bar = progress_bar("loss", "speed")
            self.bar.disable = self.bar.disable or self.quiet
            self.bar.start()
            self.task = self.bar.add_task(
                "training", total=self.settings.steps, completed=self.first_step, loss="", speed=""
            )
        self.since = (time.perf_counter(), self.first_step)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.active:
            self.bar.stop()
            with self._written():
                if exception[0] is None:
                    self._add(self.end_of_session)
                self.writer.close()

    def _describe(self) -> None:
        """What TensorBoard shows under HPARAMS and TEXT. A metric is the last value of the scalar of that name."""
        from torch.utils.tensorboard.summary import hparams

        recipe = flat(self.recipe.model_dump(mode="json", exclude={"description"}))
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in recipe.items()}
        values = {k: v if isinstance(v, bool | int | float) else _in_utf8(texts[k]) for k, v in recipe.items()}
        metrics = ["loss/train", *(["loss/validation"] if self.settings.validate_every else [])]
        *beginning, self.end_of_session = hparams(values, dict.fromkeys(metrics, 0.0))
        for summary in beginning:
            self._add(summary)
        self.writer.add_text("recipe", f"```yaml\n{self.recipe.to_yaml()}```", self.first_step)
        if self.class_names:
            names = "\n".join(f"{number}. {name}" for number, name in enumerate(self.class_names))
            self.writer.add_text("classes", _in_utf8(names), self.first_step)

    def _forget_later_steps(self) -> None:
        # A killed run has logged steps after its last checkpoint, which will be taken again.
        if self.metrics.exists():
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if self._stays(line)]
            if kept != lines:
                with atomic_path(self.metrics) as temporary:
                    temporary.write_bytes(b"".join(kept))

    def _stays(self, line: bytes) -> bool:
        """Whether a line of metrics.jsonl stays: of a step up to the first, or not ours; not if a kill cut it off."""
        try:
            values = parse_json(line)
        except ValueError:
            return line.endswith(b"\n")
        step = values.get("step") if isinstance(values, dict) else None
        return step <= self.first_step if isinstance(step, int) else line.endswith(b"\n")

    def losses(self, step: int, values: list[float], lr: float, batch_size: int) -> None:
        """The losses of the steps up to `step` since the last call."""
        if not (self.active and values):
            return
        now = time.perf_counter()
        speed = (step - self.since[1]) * batch_size / (now - self.since[0])
        self.since = (now, step)
        mean = sum(values) / len(values)
        self.scalar(step, "loss/train", mean, lr=lr, images_per_second=speed)
        self.bar.update(self.task, loss=f"loss {mean:.4f}", speed=f"{speed:,.0f} images/s")
        if not self.quiet and not console.is_terminal:
            left = (self.settings.steps - step) * batch_size / speed
            console.print(
                f"step {step}/{self.settings.steps}  loss {mean:.4f}  {speed:,.0f} images/s  {left:.0f} s left"
            )

    def scalar(self, step: int, name: str, value: float, **more: float) -> None:
        """One line of metrics.jsonl, each number also to TensorBoard."""
        values = {name: value, **more}
        with self._written():
            for key, number in values.items():
                self.writer.add_scalar(key, number, step)
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def _add(self, summary: Any, step: int = 0) -> None:
        cast(Any, self.writer.file_writer).add_summary(summary, step)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Logs are no weights: where they cannot be written, that is said once. TensorBoard fails a call too late."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                logger.warning("the logs in %s cannot be written (%s); training goes on", self.folder, error.strerror)
            self.failed = True

    def grid(self, step: int, pipeline: Pipeline, folder: Path, levels: int | None) -> None:
        """Samples of the averaged model, as far as its levels are trained, always from the same noise."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        classes = pipeline.denoiser.num_classes
        count = 8 * min(classes, 10) if classes else 64
        images = sample(pipeline, count=count, levels=levels)
        labels = label_names(pipeline, choose_labels(pipeline, None, count))
        file = folder / f"step-{step:08d}{'.gif' if images.ndim == 5 else '.png'}"
        write = save_video if images.ndim == 5 else save_grid
        write(images, file, columns=8, labels=labels)
        with Image.open(file) as picture:
            width, height = picture.size
        # The file as it is: `add_image` would encode it anew, and of clips show nothing.
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        with self._written():
            self._add(Summary(value=[Summary.Value(tag="samples", image=shown)]), step)

    def advance(self, step: int) -> None:
        self.saw_steps = True
        if self.active:
            self.bar.update(self.task, completed=step)


def _in_utf8(text: str) -> str:
    """`text` for TensorBoard, which knows no other encoding, though names of files may have one."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

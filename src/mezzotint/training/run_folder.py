"""A run's folder: whose it is, what was trained on in it, and what may be changed when it is resumed."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.conditions.text import Captioner
from mezzotint.data import CachedLatents, ImageDataset, ImageStream
from mezzotint.data.base import same_content
from mezzotint.errors import MezzotintError
from mezzotint.files import is_temporary, parse_json, write_text
from mezzotint.interop import near_runs
from mezzotint.locks import LOCK
from mezzotint.recipe import Recipe, TrainingSettings, load_recipe
from mezzotint.representations import TOKENIZERS, KLAutoencoder
from mezzotint.representations.tokenizer import OWN_FOLDER
from mezzotint.settings import Settings
from mezzotint.training.parallel import World

logger = logging.getLogger("mezzotint")

RECIPE, RECORD = "recipe.yaml", "record.json"
FOLDERS, FILES = ("state", "logs", "samples", "adapter", OWN_FOLDER), (RECIPE, RECORD, "model.safetensors")
#: what a resumed run may change: what it is called, how long it goes on, and how often it reports; nothing that a
#: weight depends on
MAY_CHANGE = {
    "name",
    *(f"training.{key}" for key in ("steps", "log_every", "validate_every", "sample_every")),
    *("training.checkpoint_every", "training.keep_checkpoints", "data.workers", "data.max_unreadable"),
}
#: what it may change besides when that is asked for: advice that is given to a run that diverges or is slow
WITH_OVERRIDE = ("training.lr", "training.grad_clip", "training.precision", "training.compile", "training.ema")
#: what stays the data set's on other data: the shape of its examples is the network's
SHAPE = ("data.size", "data.channels", "data.frames")
NAMED = 5  # classes in a sentence


class TrainedOn(Settings):
    """What a run is trained on."""

    name: str
    """The data set's, as in the recipe."""
    path: str | None
    """Where it was."""
    identity: str
    """Tells data sets apart by content."""
    class_names: tuple[str, ...]
    """In the order of their numbers."""
    images: int | None
    """How many; None: a stream, which does not say."""
    autoencoder: str | None = None
    """Digest of the autoencoder, where the representation is kl."""
    scaling: str | None = None
    """Scale, shift and std of its latents, which its configuration may say."""
    text_encoder: str | None = None
    """Digest of the frozen text encoder, where there is one."""

    @classmethod
    def of(cls, recipe: Recipe, dataset: ImageDataset | ImageStream, reader: Captioner | None) -> TrainedOn:
        """reader: of captions, where the condition is text."""
        return cls(
            name=recipe.data.name,
            path=recipe.data.path,
            identity=dataset.identity,
            class_names=dataset.class_names,
            images=None if isinstance(dataset, ImageStream) else len(dataset),
            autoencoder=dataset.info.autoencoder if isinstance(dataset, CachedLatents) else None,
            text_encoder=getattr(reader, "digest", None),
        )

    def changed(self, now: TrainedOn) -> str:
        """How `now` is other data, or nothing."""
        found = []
        if None not in (self.text_encoder, now.text_encoder) and self.text_encoder != now.text_encoder:
            found.append("its captions are read by another text encoder")
        if same_content(self.identity, now.identity):
            return "".join(found)
        if gone := [name for name in self.class_names if name not in now.class_names]:
            found.append(f"it has no class {_listed(gone)} any more")
        if new := [name for name in now.class_names if name not in self.class_names]:
            found.append(f"its classes {_listed(new)} are new" if len(new) > 1 else f"its class {new[0]} is new")
        if not found and self.class_names != now.class_names:
            found.append("its classes are in another order")
        if self.images != now.images:
            found.append(f"it has {_count(now.images)} images instead of {_count(self.images)}")
        return ", and ".join(found) or "its images, labels or captions are other ones, though as many"


class Change(Settings):
    """What was changed when a run was resumed."""

    step: int
    """From which step on."""
    recipe: dict[str, tuple[Any, Any]]
    """By key of the recipe: what it was before, and since."""
    data: TrainedOn | None = None
    """What it was trained on before, where the content was another."""


class Record(Settings):
    """record.json: what a run was trained on, and what was changed on the way."""

    format: int = 1
    """Version of the layout."""
    data: TrainedOn
    """What it is trained on now."""
    changes: tuple[Change, ...] = ()
    """In the order of their steps."""


@dataclass(frozen=True)
class Begun:
    """A run that may begin or go on: its record so far, and what is to be added to it."""

    run: Path
    record: Record
    change: Change | None
    notes: Sequence[str]
    """What a person should be told."""
    before: TrainingSettings | None = None
    """How it was trained so far; None: not at all."""

    def decays_at(self, step: int, decays: Sequence[float]) -> tuple[float, ...]:
        """Those of the averages in the state after `step` steps, where the recipe's are now `decays`."""
        now = tuple(decays)
        for change in reversed([*self.record.changes, *([] if self.change is None else [self.change])]):
            if "training.ema" in change.recipe and (change is self.change or step <= change.step):
                now = tuple(change.recipe["training.ema"][0])
        return now

    def check_length(self, now: TrainingSettings, made: int, *, override: bool) -> str:
        """What a person should be told where the run, with `made` steps behind it, is to have another number of them.

        Raises `MezzotintError` for fewer than are made; and where the learning rates of steps that it was yet to make
        would change, as a decay goes by their number, unless `override`. A decay that has ended is the one over the new
        number, as if the run had had it from the start.
        """
        was = self.before
        if now.steps < made and (was is None or was.steps != now.steps):
            raise MezzotintError(
                f"{self.run} has made {made:,} steps already, and training.steps={now.steps} is fewer; give more to "
                f"train it longer, or none to take its own: {resume_command(self.run)}"
            )
        if was is None or was.steps == now.steps or now.lr_schedule == "constant" or not made:
            return ""
        decay, rate, planned = f"{now.lr_schedule} decay", now.lr_after(made), was.lr_after(min(made, was.steps))
        if made >= was.steps:
            if rate == planned:  # it was still warming up
                return ""
            left = f"{planned:.1e}" if planned else "0"
            return (
                f"the {decay} had taken the learning rate to {left} at step {made:,}; over {now.steps:,} steps it goes "
                f"on at {rate:.1e}"
            )
        if not override:
            raise MezzotintError(
                f"{self.run} has made {made:,} of {was.steps:,} steps, and its {decay} goes by their number: over "
                f"{now.steps:,} the learning rate goes on at {rate:.1e} instead of {planned:.1e}; add --override "
                "(Python: override=True) to go on so, or leave training.steps out"
            )
        return (
            f"the {decay} ends at step {now.steps:,} instead of {was.steps:,}: the learning rate goes on at {rate:.1e} "
            f"instead of {planned:.1e}"
        )

    def check_autoencoder(self, autoencoder: KLAutoencoder) -> None:
        """Raises `MezzotintError` unless the autoencoder is the one that the run was trained with."""
        known = self.record.data
        for what, before, now in (
            ("autoencoder", known.autoencoder, autoencoder.digest),
            ("scaling of the autoencoder's latents", known.scaling, repr(autoencoder.scaling)),
        ):
            if before not in (None, now):
                raise MezzotintError(
                    f"{self.run} was trained with another {what} than representation.path names now; set it to that "
                    "one, or choose another --out"
                )

    def write(self, recipe: Recipe, step: int, autoencoder: KLAutoencoder | None) -> None:
        """Write record and recipe; the run goes on after `step` steps."""
        # What was to hold from a later step on holds from this one: the steps between are taken again.
        changes = [change.model_copy(update={"step": min(change.step, step)}) for change in self.record.changes]
        if self.change is not None:
            changes.append(self.change.model_copy(update={"step": step}))
        data = self.record.data
        if autoencoder is not None:
            seen = {"autoencoder": autoencoder.digest, "scaling": repr(autoencoder.scaling)}
            data = data.model_copy(update=seen)
        record = self.record.model_copy(update={"data": data, "changes": tuple(changes)})
        # In this order: a folder with a recipe has a record.
        write_text(self.run / RECORD, json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
        recipe.write(self.run)


def is_run(folder: str | Path) -> bool:
    """Whether a run was begun in `folder`: a recipe.yaml alone may be somebody's own."""
    place = Path(folder)
    others = (name for name in (*FOLDERS, *FILES) if name != RECIPE)
    return (place / RECIPE).is_file() and any((place / name).exists() for name in others)


def check_is_run(folder: str | Path) -> None:
    """Raise `MezzotintError` unless `is_run`."""
    if is_run(folder):
        return
    there = "there is no run" if Path(folder).is_dir() else "there is no folder"
    near = [run for run in near_runs(Path(folder)) if is_run(run)]
    hint = f"closest: {', '.join(near)}" if near else "begin one with 'mezzotint train RECIPE --out FOLDER'"
    raise MezzotintError(f"{there} at {folder}; expected one that 'mezzotint train' wrote; {hint}")


def resume_command(run: Path) -> str:
    """What is to be typed to go on with a run."""
    return f"mezzotint resume {shlex.quote(str(run))}"


def check_run(
    run: Path, recipe: Recipe, data: TrainedOn, here: World, *, resume: bool, override: bool, data_changed: bool
) -> Begun:
    """Raise `MezzotintError`, on every process, unless the run is new, or to be resumed, on these data by this recipe.

    resume: the folder's run goes on. override: it may change `WITH_OVERRIDE`. data_changed: and the data set.
    """
    begun, problem = None, ""
    try:
        begun = _agree(run, recipe, data, resume, override, data_changed)
    except MezzotintError as error:
        problem = str(error)
    if here.any(bool(problem)) or begun is None:
        raise MezzotintError(problem or f"{run} cannot be used; see the first process's message")
    for note in begun.notes if here.is_main else ():
        logger.warning("%s", note)
    return begun


def _agree(run: Path, recipe: Recipe, now: TrainedOn, resume: bool, override: bool, data_changed: bool) -> Begun:
    for name in (*FOLDERS, *FILES):
        if (path := run / name).exists() and path.is_dir() != (name in FOLDERS):
            what, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
            raise MezzotintError(
                f"{path} is {what}, and a run has {wanted} of that name; move it, or choose another --out"
            )
    if not (run / RECIPE).exists():
        # What a start has written that was killed before the recipe was there is not in the way.
        if run.is_dir() and not all(_is_of_a_start(path) for path in run.iterdir()):
            raise MezzotintError(f"{run} is not empty and not a run folder; choose another --out")
        return Begun(run, Record(data=now), None, [])
    if not resume:
        raise MezzotintError(
            f"{run} already holds a run; go on with it by {resume_command(run)}, or choose another --out"
        )
    record = _read(run)
    notes = []
    before = None
    if record is None:
        notes.append(f"{run} does not say what it was trained on, as it was begun by an earlier version; it does now")
    elif what := record.data.changed(now):
        if not data_changed:
            raise MezzotintError(
                f"the data set is not the one that {run} was trained on: {what}; take that one, or add --data-changed "
                "(Python: data_changed=True) to go on with this one"
            )
        notes.append(f"{run} goes on with other data: {what}")
        before = record.data
    own = load_recipe(run)
    changed = _differences(own, recipe)
    accepted = MAY_CHANGE | set(WITH_OVERRIDE if override else ()) | _elsewhere(run, recipe, changed, record, now)
    if data_changed:
        accepted |= {key for key in changed if key.startswith("data.") and key not in SHAPE}
    if refused := {key: values for key, values in changed.items() if key not in accepted}:
        raise _another(run, refused)
    if paths := [key for key in ("data.path", "representation.path", "condition.encoder", "init") if key in changed]:
        moved = ", ".join(f"{key} ({changed[key][1]})" for key in paths if not (before and key == "data.path"))
        notes += [f"{run} goes on with the same content at another place: {moved}"] if moved else []
    changes = record.changes if record is not None else ()
    kept = now
    if record is not None:  # what only the autoencoder tells, which is not read yet
        there = record.data
        seen = {"autoencoder": now.autoencoder or there.autoencoder, "scaling": now.scaling or there.scaling}
        kept = now.model_copy(update=seen)
    change = Change(step=0, recipe=changed, data=before) if changed or before else None
    return Begun(run, Record(data=kept, changes=changes), change, notes, own.training)


def _is_of_a_start(path: Path) -> bool:
    return path.name in (LOCK, RECORD) or OWN_FOLDER in path.name or is_temporary(path)


def _differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """What differs in two recipes, by key, but for how they are sampled and described: there and here."""

    def compared(recipe: Recipe) -> dict[str, Any]:
        exclude: dict[str, Any] = {"sampling": True, "guidance": True, "description": True}
        if recipe.representation.name in TOKENIZERS:  # a run keeps a tokenizer of its own, wherever it was taken from
            exclude["representation"] = {"path"}
        return flat(recipe.model_dump(mode="json", exclude=exclude))

    before, after = compared(old), compared(new)
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _elsewhere(
    run: Path, recipe: Recipe, changed: dict[str, tuple[Any, Any]], record: Record | None, now: TrainedOn
) -> set[str]:
    """The keys of what may lie at another place, as it is the same there, or is in the run already."""
    found = set()
    if record is not None:
        found.add("data.path")  # its content has been compared
        if recipe.representation.name == "kl" and record.data.autoencoder is not None:
            found.add("representation.path")  # that of the latents, or compared when it is loaded
        if now.text_encoder is not None and now.text_encoder == record.data.text_encoder:
            found.add("condition.encoder")
    if None not in changed.get("init", (None, None)) and any((run / "state").glob("step-*")):
        found.add("init")  # a checkpoint has its own weights
    return found


def _another(run: Path, refused: dict[str, tuple[Any, Any]]) -> MezzotintError:
    shown = ", ".join(f"{key} ({there} there, {here} here)" for key, (there, here) in list(refused.items())[:3])
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    allowed = [key for key in refused if key in WITH_OVERRIDE]
    if len(allowed) == len(refused):
        return MezzotintError(
            f"{run} was begun with other settings: {shown}{more}; add --override (Python: override=True) to go on with "
            f"the new ones, or keep that run's own: {resume_command(run)}"
        )
    rest = f" (of these, --override would allow {', '.join(allowed)})" if allowed else ""
    if "data.path" in refused:
        rest += " (--data-changed would allow data.path)"
    return MezzotintError(
        f"{run} belongs to another recipe: {shown}{more}{rest}; go on by its own ({resume_command(run)}), or choose "
        "another --out"
    )


def _read(run: Path) -> Record | None:
    """The record of a run; None where an earlier version has begun it. Raises `MezzotintError` where it is damaged."""
    file = run / RECORD
    try:
        return Record.parse(parse_json(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, MezzotintError) as error:
        raise MezzotintError(
            f"{file} is damaged ({error}); put it back, or remove it to go on without what it says"
        ) from None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _count(number: int | None) -> str:
    return "uncounted" if number is None else f"{number:,}"

"""Two commits, the same bits? Trains, resumes, samples and probes small recipes over all words with both, and compares.

    python tests/same_bits.py COMMIT             # with what is checked out
    python tests/same_bits.py COMMIT COMMIT

Both run on this machine, in this environment, by the command line alone, so that the code between may be rebuilt at
will. Resolved recipes, weights and averages, images and probes must be equal bit for bit; keys that only one of two
recipes has are listed, as new keys are no change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHORT = [
    "training.batch_size=8", "training.warmup_steps=0", "training.lr_schedule=constant", "training.log_every=1",
    "training.checkpoint_every=3", "sampling.steps=4", "data.workers=0",
]  # fmt: skip
DIT = ["backbone.width=32", "backbone.depth=2", "backbone.heads=2"]
FOLDER = "data={name: folder, path: pictures, size: 16, channels: 3, flip: true, test_fraction: 0.25}"
OUTER = "backbone.outer=[{channels: [8, 16], resblocks: [1, 1], groups: 4}]"
PCA = ["representation=patch-pca", "representation.stride=2", "representation.channels=2"]

#: by name: what 'mezzotint train' is told, beside SHORT
RECIPES: dict[str, list[str]] = {
    "sit": ["digits", *DIT, "training.ema=[0.9, 0.99]", "objective.stratified=true"],
    "gvp-noise-guided": ["digits", *DIT, "interpolant=gvp", "target=noise", "objective.time_eps=1e-3",
                         "sampling=ode-heun", "guidance={scale: 1.5, interval: [0.1, 0.8]}"],
    "vp-score-sde": ["digits", *DIT, "interpolant=vp", "target=score", "objective.time_eps=1e-3", "sampling=sde-sigma",
                     "backbone.conditioning=in-context"],
    "ddpm-learned-variance": ["digits", *DIT, "interpolant=ddpm", "target=noise", "variance=learned",
                              "objective.times=auto", "objective.weighting=min-snr", "time_input=[1000, -1]",
                              "sampling=ddpm"],
    "captions-of-bytes": ["data=captions:pictures", "digits", *DIT, "data.size=16", "data.channels=3",
                          "condition=text", "backbone.conditioning=cross-attention", "interpolant=cosine", "target=v",
                          "sampling={sampler: ddim, eta: 1}"],
    "ldae": ["digits", *DIT, *PCA, "interpolant=linear-variance", "target=data", "backbone.input=image",
             "backbone.output=image", "objective.residual_weight=0.1", "backbone.adaln_ratio=0.25",
             "backbone.patch_size=2", "sampling=ode-euler"],
    "denoising-autoencoder": ["dae-digits", *DIT],
    "diffussm": ["diffussm-digits", "backbone.width=16", "backbone.depth=2", "backbone.state=8",
                 "backbone.scan=[row, column-snake]", "training.weight_decay=0.1", "training.grad_clip=0.5"],
    "unet-of-folder": ["digits", FOLDER, "backbone={name: unet, channels: [16, 32], resblocks: [1, 1], "
                       "attention: [0, 1], heads: 2, groups: 4, dropout: 0.1}", "target=v", "sampling=ode-rk4"],
    "matryoshka": ["digits", FOLDER, "data.size=16", *DIT, OUTER, "interpolant={name: cosine, snr_power: 1}",
                   "target=v", "training.stages=[{levels: 1, steps: 2}]", "objective.level_weights=[1, 2]",
                   "sampling=ddim"],
    "clips-unet": ["mdm-moving-digits", "backbone.channels=[16, 32]", "backbone.time_width=32", "data.examples=40",
                   "backbone.groups=4", "backbone.heads=2"],
    "clips-dit": ["digits", "data={name: moving-digits, size: 16, frames: 4, examples: 40}", *DIT,
                  "backbone.tubelet_size=2"],
    "patch-vae": ["digits", *DIT, "representation={name: patch-vae, stride: 2, channels: 2, fit: {steps: 5}}",
                  "backbone.patch_size=1"],
    "conv-vae": ["digits", FOLDER, *DIT, "representation={name: conv-vae, stride: 4, channels: 2}",
                 "representation.fit.steps=3", "representation.fit.widths=[8, 8, 16]", "representation.fit.groups=4",
                 "backbone.patch_size=1"],
    "lora": ["digits", *DIT, "init=sit", "training.lora.rank=2", "training.lora.alpha=4"],
    "frozen": ["digits", *DIT, "init=sit", "training.freeze=[blocks.*]"],
    "bf16-accumulated": ["digits", *DIT, "training.precision=bf16", "training.accumulate=2", "training.ema_warmup=true",
                         "training.betas=[0.8, 0.9]", "sampling=sde-heun-linear"],
    "idx-files": ["fashion-mnist", "data.path=idx", *DIT, "backbone.patch_size=4", "objective.weighting=likelihood",
            "objective.time_eps=1e-2"],
}  # fmt: skip
NEVER_SAMPLED = ("denoising-autoencoder",)


def make_data() -> None:
    """Pictures with captions in two folders, and IDX files, in the working folder."""
    import numpy as np
    from PIL import Image

    rng, lines = np.random.default_rng(0), []
    for kind in ("cats", "dogs"):
        (Path("pictures") / kind).mkdir(parents=True)
        for number in range(8):
            name = f"{kind}/{number}.png"
            Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(Path("pictures") / name)
            lines.append(json.dumps({"file_name": name, "text": f"one of the {kind}"}))
    Path("pictures/metadata.jsonl").write_text("\n".join(lines))
    Path("idx").mkdir()
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        Path(f"idx/{split}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3, 0, 0, 0, 40, 0, 0, 0, 28, 0, 0, 0, 28]) + images.tobytes()
        )
        labels = bytes(i % 10 for i in range(40))
        Path(f"idx/{split}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 40]) + labels)


def work(only: list[str]) -> None:
    """Run every recipe in the working folder, with the mezzotint that is on the path."""
    import torch

    from mezzotint.__main__ import main

    torch.set_num_threads(1)

    def run(*words: str) -> None:
        sys.argv = ["mezzotint", *words]
        try:
            main()
        except SystemExit as stopped:
            if stopped.code:
                raise SystemExit(f"mezzotint {' '.join(words)}: exit code {stopped.code}") from None

    make_data()
    for name, words in RECIPES.items():
        if name not in only and not (name == "sit" and {"lora", "frozen"} & {*only}):
            continue
        recipe = next(word for word in words if "=" not in word)
        train = ["train", recipe, *SHORT, *(word for word in words if "=" in word), "--out", name, "--device", "cpu"]
        run(*train, "training.steps=3")
        run(*train, "training.steps=6", "--resume")
        if name not in NEVER_SAMPLED:
            clips = name.startswith("clips")
            images = [] if clips else ["--npz", f"{name}/samples.npz"]
            run("sample", name, "--count", "6", *images, "--device", "cpu")
        if "captions" not in name and not name.startswith("clips"):
            run("probe", name, "--probe", "ridge", "--count", "8", "--device", "cpu")


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """What a run holds, by name: the resolved recipe, every tensor, every image, every probe."""
    import numpy as np
    import yaml
    from PIL import Image
    from safetensors.numpy import load_file

    yield "recipe", yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    for file in sorted(folder.rglob("*.safetensors")):
        yield f"weights {file.relative_to(folder)}", load_file(file)
    if (file := folder / "samples.npz").is_file():
        with np.load(file) as arrays:
            yield "images", dict(arrays)
    for file in sorted(folder.glob("samples.*")):
        if file.suffix in (".png", ".gif"):
            with Image.open(file) as image:
                yield f"images {file.name}", {"pixels": np.asarray(image)}
    if (file := folder / "probe.json").is_file():
        yield "probes", json.loads(file.read_text())["rows"]


def differences(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Where two contents differ; a key that only one of two mappings has begins with "only"."""
    import numpy as np

    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys(), key=str):
            where = f"{key}.{name}" if key else str(name)
            if name in one and name in other:
                yield from differences(one[name], other[name], where)
            else:
                yield f"only {'before' if name in one else 'after'}: {where}"
    elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            yield key
    elif one != other:
        yield f"{key}: {one!r} → {other!r}" if len(repr((one, other))) < 200 else key


def compare(before: Path, after: Path, names: list[str]) -> int:
    """Print a line for each recipe; how many differ."""
    failed, new_keys = 0, set()
    for name in names:
        old, new = dict(contents(before / name)), dict(contents(after / name))
        found = {what: list(differences(old.get(what), new.get(what))) for what in old | new}
        new_keys |= {line for line in found["recipe"] if line.startswith("only")}
        found["recipe"] = [line for line in found["recipe"] if not line.startswith("only")]
        wrong = {what: lines for what, lines in found.items() if lines}
        failed += bool(wrong)
        tensors = sum(len(value) for what, value in old.items() if what.startswith("weights"))
        others = [what.split()[0] for what in old if not what.startswith("weights")]
        print(f"{name:24} {'DIFFERS' if wrong else 'same bits'}: {tensors} tensors, {', '.join(dict.fromkeys(others))}")
        for what, lines in wrong.items():
            print("".join(f"    {what}: {line}\n" for line in lines[:5]), end="")
    for line in sorted(new_keys):
        print(line)
    print(f"{len(names) - failed} of {len(names)} recipes have the same bits")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="one or two; the second one's default is what is checked out")
    parser.add_argument("--only", nargs="+", default=[*RECIPES], choices=[*RECIPES], help="some of the recipes")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.only)
        return 0
    if not 1 <= len(given.commits) <= 2:
        parser.error("expected one commit or two")
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number, commit in enumerate([*given.commits, None][:2]):
            source = ROOT
            if commit is not None:
                source = Path(folder) / f"source-{number}"
                source.mkdir()
                tree = subprocess.run(["git", "-C", ROOT, "archive", commit, "src"], check=True, capture_output=True)
                subprocess.run(["tar", "-x", "-C", source], input=tree.stdout, check=True)
            runs.append(Path(folder) / f"runs-{number}")
            runs[-1].mkdir()
            places = {"PYTHONPATH": str(source / "src"), "MEZZOTINT_CACHE": str(Path(folder) / f"cache-{number}")}
            command = [sys.executable, __file__, "--work", "--only", *given.only]
            with open(Path(folder) / f"log-{number}", "w+") as log:
                done = subprocess.run(
                    command, cwd=runs[-1], env={**os.environ, **places}, stdout=log, stderr=subprocess.STDOUT
                )
                if done.returncode:
                    log.seek(0)
                    sys.exit(f"{commit or 'what is checked out'} failed:\n" + "".join(log.readlines()[-15:]))
        return 1 if compare(*runs, given.only) else 0


if __name__ == "__main__":
    sys.exit(main())

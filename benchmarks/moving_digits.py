"""Do a model's clips show digits that move? python benchmarks/moving_digits.py RUN.

The brightest square of half the frame's side is cut out of every frame, and a classifier of still digits says which one
it is. A clip holds its digit if all its frames are said to be the same. The digit's place is the centre of light; a
step is how far it goes from a frame to the next, a bend how much a step differs from the one before. Real clips, of
digits that the model never saw, stand beside.
"""

from __future__ import annotations

import argparse

import torch
from measure import table
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mezzotint import load, sample
from mezzotint.data import MovingDigits
from mezzotint.data.transforms import to_uint8
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.classifier import ClassifierNetwork, trained_classifier
from mezzotint.pipeline import choose_labels
from mezzotint.recipe import DataSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=200, help="Clips.")
    parser.add_argument("--guidance", type=float, help="Instead of the recipe's.")
    parser.add_argument("--steps", type=int, help="Of the sampler, instead of the recipe's.")
    arguments = parser.parse_args()
    try:
        pipeline = load(arguments.run)
        data = pipeline.recipe.data
        test = data.load("test") if data.name == "moving-digits" else None
        if not isinstance(test, MovingDigits) or data.channels != 1:
            raise SystemExit("this scores grey moving-digits; give a run of one that was trained on them")
        asked = choose_labels(pipeline, None, arguments.count)
        if not isinstance(asked, Tensor):
            raise SystemExit("this scores clips by their class; give a run that is asked by classes")
        judge = trained_classifier(DataSettings(name="digits", size=data.size // 2, channels=1))
        steps = {} if arguments.steps is None else {"steps": arguments.steps}
        drawn = sample(pipeline, count=arguments.count, guidance=arguments.guidance, **steps)
    except MezzotintError as error:
        raise SystemExit(str(error)) from None
    real, labels = test.get_batch(torch.arange(arguments.count))
    clips = {"generated": (to_uint8(drawn), asked), "real": (real, labels)}
    head = ["", "frames of their class", "clips that hold their digit", "step, pixels", "bend, pixels"]
    print(table(head, [[name, *scores(judge, *some)] for name, some in clips.items()]))


def scores(judge: ClassifierNetwork, clips: Tensor, labels: Tensor) -> list[str]:
    """Of clips uint8 (B, F, 1, H, W)."""
    frames = clips.flatten(0, 1)
    size, side = frames.shape[-1], frames.shape[-1] // 2
    room = size - side + 1  # places of the square's corner
    brightest = avg_pool2d(frames.double(), side, stride=1).flatten(1).argmax(1)
    top, left = brightest // room, brightest % room
    along, n = torch.arange(side), torch.arange(len(frames))
    rows, columns = top[:, None, None] + along[:, None], left[:, None, None] + along
    said = judge.predict(frames[n[:, None, None], 0, rows, columns].unsqueeze(1)).view(clips.shape[:2])
    weights = frames.double().squeeze(1) + 1e-9
    pixel = torch.arange(size, dtype=torch.float64)
    centre = torch.stack([(weights.sum(2) * pixel).sum(1), (weights.sum(1) * pixel).sum(1)], 1)
    steps = (centre / weights.sum((1, 2))[:, None]).view(*clips.shape[:2], 2).diff(dim=1)
    return [
        f"{(said == labels[:, None]).double().mean():.1%}",
        f"{(said == said[:, :1]).all(1).double().mean():.1%}",
        f"{steps.norm(dim=2).mean():.2f}",
        f"{steps.diff(dim=1).norm(dim=2).mean():.2f}",
    ]


if __name__ == "__main__":
    main()

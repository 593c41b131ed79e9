"""A training loop of your own: the library's denoiser, objective and averages; your data, optimizer and logs.

python examples/training_loop.py [FOLDER]        # digits, about a minute; then: mezzotint sample FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import mezzotint
from mezzotint.data import BatchOrder, iterate_batches


def train(run: Path, steps: int = 1000, batch_size: int = 64) -> mezzotint.Pipeline:
    """Train on scikit-learn's digits into `run`, a folder that `mezzotint.load` and every command read."""
    recipe = mezzotint.load_recipe("digits", {"backbone.num_classes": 10})
    dataset = recipe.data.load("train")
    pipeline = mezzotint.build(recipe, class_names=dataset.class_names)
    denoiser = pipeline.denoiser.train()  # or: Denoiser(your_module, "linear", in_shape=(1, 8, 8), num_classes=10)
    objective = mezzotint.Objective(denoiser, weighting="velocity")
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    ema = mezzotint.EMA(denoiser, [0.999], warmup=True)
    generator = torch.Generator().manual_seed(0)

    batches = iterate_batches(dataset, BatchOrder.over(dataset, batch_size), start_step=0, stop_step=steps)
    for step, batch in enumerate(batches, start=1):
        draw = objective.draw(batch_size, generator)  # times, noise, and which labels to leave out for guidance
        loss = objective(batch.images, batch.labels, draw)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(denoiser, step)
        if step % 100 == 0 or step == steps:
            print(f"step {step}  loss {loss.item():.4f}")

    pipeline.denoiser = ema.modules[0]
    pipeline.save(run)
    torch.save({"model": denoiser.state_dict(), "optimizer": optimizer.state_dict()}, run / "training.pt")
    return pipeline


if __name__ == "__main__":
    train(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-loop"))

"""The demo: train on digits, draw ten of each class, score them. `make demo` runs it.

Writes runs/demo/samples.png and runs/demo/scores.json.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

STARTED = time.perf_counter()  # before the imports below, which a user waits for too

import mezzotint  # noqa: E402
from mezzotint.cli.tables import print_scores  # noqa: E402
from mezzotint.files import write_text  # noqa: E402

RUN = Path("runs/demo")
GUIDANCE = 1.5


def main() -> None:
    """Train, sample and score; about two minutes on two CPU cores."""
    shutil.rmtree(RUN, ignore_errors=True)  # the demo's own folder: every run starts afresh
    begun = time.perf_counter()
    pipeline = mezzotint.train(mezzotint.load_recipe("digits"), RUN, device="cpu")
    train_seconds = time.perf_counter() - begun

    images = mezzotint.sample(pipeline, count=100, guidance=GUIDANCE)
    mezzotint.save_grid(images, RUN / "samples.png", columns=10)

    scores = mezzotint.evaluate(pipeline, count=1000, guidance=GUIDANCE, progress=True)
    scores |= {"train_seconds": train_seconds, "total_seconds": time.perf_counter() - STARTED}
    print_scores(scores)
    write_text(RUN / "scores.json", json.dumps(scores, indent=2) + "\n")
    print(f"trained in {train_seconds:.0f} s, all in {scores['total_seconds']:.0f} s")
    print(f"wrote {RUN / 'samples.png'} and {RUN / 'scores.json'}")


if __name__ == "__main__":
    main()

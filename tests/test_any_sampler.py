"""Official checkpoints through every sampler of the library, and what each costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mezzotint
from mezzotint.evaluation.cost import sampling_evaluations
from mezzotint.interop import convert
from mezzotint.pipeline import build, save_weights
from mezzotint.representations import Pixels
from mezzotint.samplers import SAMPLERS
from mezzotint.samplers.sde import DIFFUSIONS

WAYS = [
    *(name for name in SAMPLERS if not name.startswith("sde")),
    *(f"{family}-{form}" for family in ("sde", "sde-heun") for form in DIFFUSIONS),
]


@pytest.fixture(scope="module", params=["dit-xl-2-256", "sit-xl-2-256"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> mezzotint.Pipeline:
    """A file of the official format, with a small network, as `mezzotint.load` reads it."""
    folder = tmp_path_factory.mktemp("official")
    small = ["backbone.width=16", "backbone.depth=2", "backbone.heads=2", "data.size=64", "backbone.num_classes=10"]
    recipe = mezzotint.load_recipe(request.param, small)
    made = build(recipe)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.denoiser.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    save_weights(made.denoiser.backbone, folder / "run" / "model.safetensors", {})
    loaded = mezzotint.load(convert(folder / "run", folder / "weights.pt", to="official"), recipe=recipe)
    loaded.representation = Pixels()  # the latents themselves
    return loaded


@pytest.mark.parametrize("sampler", WAYS)
def test_official_weights_with_any_sampler(pipeline: mezzotint.Pipeline, sampler: str) -> None:
    """Finite, different for another seed, the same for the same one, in as many evaluations as documented."""
    steps = 6
    calls = []
    hook = pipeline.denoiser.backbone.register_forward_hook(lambda *_: calls.append(1))
    spacing = {"spacing": "log-snr"} if sampler == "dpm-solver++" else {}
    options = {"count": 3, "sampler": sampler, "steps": steps, **spacing}
    images = mezzotint.sample(pipeline, [1, 2], **options)
    hook.remove()
    assert images.shape == (3, 4, 8, 8)
    assert images.isfinite().all()
    assert torch.equal(images, mezzotint.sample(pipeline, [1, 2], **options))
    assert not torch.allclose(images, mezzotint.sample(pipeline, [1, 2], seed=1, **options), atol=1e-2)
    recipe = pipeline.recipe.model_copy(
        update={"sampling": pipeline.recipe.sampling.model_copy(update={"steps": steps})}
    )
    family = sampler if sampler in SAMPLERS else sampler.rpartition("-")[0]
    assert sampling_evaluations(recipe)[family] in (len(calls), None)

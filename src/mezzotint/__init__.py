"""mezzotint: diffusion models in any combination of interpolant, target, backbone, representation and sampler.

>>> import mezzotint
>>> pipeline = mezzotint.load("runs/demo")
>>> images = mezzotint.sample(pipeline, classes=[3, 8], count=8, guidance=2.0)
>>> mezzotint.save_grid(images, "digits.png")
"""

from mezzotint.denoiser import Denoiser, Prediction
from mezzotint.errors import MezzotintError
from mezzotint.guidance import ConditionalModel, Guidance
from mezzotint.images import save_grid
from mezzotint.pipeline import Pipeline, build, load, sample
from mezzotint.recipe import Recipe, load_recipe, recipe_names
from mezzotint.samplers import Sampler
from mezzotint.training import train

__all__ = [
    "ConditionalModel",
    "Denoiser",
    "Guidance",
    "MezzotintError",
    "Pipeline",
    "Prediction",
    "Recipe",
    "Sampler",
    "build",
    "load",
    "load_recipe",
    "recipe_names",
    "sample",
    "save_grid",
    "train",
]

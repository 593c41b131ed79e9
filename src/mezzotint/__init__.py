"""mezzotint: diffusion models in any combination of interpolant, target, backbone, representation and sampler.

>>> import mezzotint
>>> pipeline = mezzotint.load("runs/demo")
>>> images = mezzotint.sample(pipeline, classes=[3, 8], count=8, guidance=2.0)
>>> mezzotint.save_grid(images, "digits.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.denoiser import Denoiser as Denoiser
    from mezzotint.denoiser import Prediction as Prediction
    from mezzotint.encoding import encode as encode
    from mezzotint.errors import MezzotintError as MezzotintError
    from mezzotint.evaluation.end_to_end import finetune_classifier as finetune_classifier
    from mezzotint.evaluation.end_to_end import load_classifier as load_classifier
    from mezzotint.evaluation.mae import open_mae as open_mae
    from mezzotint.evaluation.mae import train_mae as train_mae
    from mezzotint.evaluation.probing import probe as probe
    from mezzotint.evaluation.scores import evaluate as evaluate
    from mezzotint.features import pooled_features as pooled_features
    from mezzotint.guidance import ConditionalModel as ConditionalModel
    from mezzotint.guidance import Guidance as Guidance
    from mezzotint.images import save_grid as save_grid
    from mezzotint.interop import convert as convert
    from mezzotint.interop import load as load
    from mezzotint.interpolants import Interpolant as Interpolant
    from mezzotint.objectives import Objective as Objective
    from mezzotint.pipeline import Pipeline as Pipeline
    from mezzotint.pipeline import build as build
    from mezzotint.pipeline import sample as sample
    from mezzotint.recipe import Recipe as Recipe
    from mezzotint.recipe import load_recipe as load_recipe
    from mezzotint.recipe import override_recipe as override_recipe
    from mezzotint.recipe import recipe_names as recipe_names
    from mezzotint.samplers import Sampler as Sampler
    from mezzotint.samplers.likelihood import log_likelihood as log_likelihood
    from mezzotint.training import resume as resume
    from mezzotint.training import train as train
    from mezzotint.training.ema import EMA as EMA

# Where each public name lives. Each is imported when first used: `mezzotint --help` and shell completion need not wait
# for torch.
_HOMES = {
    "ConditionalModel": "guidance",
    "Denoiser": "denoiser",
    "EMA": "training.ema",
    "Guidance": "guidance",
    "Interpolant": "interpolants",
    "MezzotintError": "errors",
    "Objective": "objectives",
    "Pipeline": "pipeline",
    "Prediction": "denoiser",
    "Recipe": "recipe",
    "Sampler": "samplers",
    "build": "pipeline",
    "convert": "interop",
    "encode": "encoding",
    "evaluate": "evaluation.scores",
    "finetune_classifier": "evaluation.end_to_end",
    "load": "interop",
    "load_classifier": "evaluation.end_to_end",
    "load_recipe": "recipe",
    "log_likelihood": "samplers.likelihood",
    "open_mae": "evaluation.mae",
    "override_recipe": "recipe",
    "pooled_features": "features",
    "probe": "evaluation.probing",
    "recipe_names": "recipe",
    "resume": "training",
    "sample": "pipeline",
    "save_grid": "images",
    "train": "training",
    "train_mae": "evaluation.mae",
}
__all__ = ["__version__", *_HOMES]

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mezzotint.{_HOMES[name]}"), name)
    try:  # rooms, as in mezzotint.data
        return import_module(f"mezzotint.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

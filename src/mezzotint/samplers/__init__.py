"""Samplers: how to walk from noise to data. `Sampler` names one with its settings; each family is one file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mezzotint.denoiser import Model
from mezzotint.errors import MezzotintError, closest
from mezzotint.interpolants import Interpolant
from mezzotint.samplers import ddpm, multistep, ode, sde
from mezzotint.samplers.noise import Generators, example_generators, randn
from mezzotint.samplers.threshold import Threshold, Thresholded
from mezzotint.samplers.times import Spacing, respaced_times, time_grid
from mezzotint.settings import Settings

__all__ = ["SAMPLERS", "Sampler", "example_generators", "randn"]

#: name → network evaluations per step
SAMPLERS: dict[str, int | None] = {
    "ddpm": 1,
    "ddim": 1,
    "ode-euler": 1,
    "ode-heun": 2,
    "ode-rk4": 4,
    "ode-dopri5": None,
    "sde": 1,
    "sde-heun": 2,
    "dpm-solver++": 1,
}


class Sampler(Settings):
    """One sampler with its settings; any of them works with any model that the equation allows."""

    sampler: str = "ode-heun"
    """ddpm, ddim, ode-euler, ode-heun, ode-rk4, ode-dopri5, sde, sde-heun or dpm-solver++; `sde-sigma` is sde with
    diffusion sigma, and so on."""
    steps: int = Field(50, ge=1)
    """Number of steps, the last one included. For ode-dopri5, which chooses its own, the number of points reported."""
    spacing: Spacing = "uniform"
    """Spacing of the times: uniform, quadratic, log-snr; or ddim (whole strides) for ddpm, ddim on discrete steps."""
    eta: float = Field(0.0, ge=0, le=1)
    """ddim: 0 is deterministic, 1 has the ancestral variance."""
    variance: Literal["auto", "learned", "lower", "upper"] = "auto"
    """ddpm: the step's variance; auto is the learned one where the model has it, else the lower bound (beta-tilde)."""
    diffusion: str = "sigma"
    """sde: the form of w(t): constant, sigma, linear, sbdm, sin2, increasing or decreasing."""
    diffusion_scale: float = Field(1.0, ge=0)
    """sde: factor on w(t). SiT's public code defines its diffusion as w / 2: use 2 (sbdm: 1) for its norm of 1."""
    last_step: sde.LastStep = "mean"
    """sde: what replaces the last step: mean (drift only), tweedie (posterior mean), euler (ODE step); none: the SDE is
    followed as far as the score exists (t = eps)."""
    last_step_size: float = Field(0.04, gt=0, lt=1)
    """sde: size of the last step in t."""
    rtol: float = Field(1e-3, gt=0)
    """ode-dopri5: relative tolerance."""
    atol: float = Field(1e-6, gt=0)
    """ode-dopri5: absolute tolerance."""
    threshold: Threshold = "none"
    """Clip what the model takes for the data: static, to [-1, 1]; dynamic, to a quantile of each image, then scaled."""
    threshold_quantile: float = Field(0.995, gt=0, le=1)
    """dynamic threshold: share of an image's numbers that it leaves alone."""
    eps: float = Field(1e-3, gt=0, lt=0.5)
    """How far from a singular end of [0, 1] the model is first and last asked; regular ends are reached exactly."""

    @model_validator(mode="before")
    @classmethod
    def _split_name(cls, values: Any) -> Any:
        name = values.get("sampler") if isinstance(values, dict) else None
        if isinstance(name, str) and name not in SAMPLERS and name.startswith("sde-"):
            prefix, _, form = name.rpartition("-")
            if prefix in SAMPLERS:
                values = {**values, "sampler": prefix, "diffusion": form}
        return values

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str) -> str:
        if name not in SAMPLERS:
            raise ValueError(f"sampler {name!r} is unknown; {closest(name, SAMPLERS)}")
        return name

    @field_validator("diffusion")
    @classmethod
    def _known_diffusion(cls, name: str) -> str:
        if name not in sde.DIFFUSIONS:
            raise ValueError(f"sde diffusion {name!r} is unknown; {closest(name, sde.DIFFUSIONS)}")
        return name

    def evaluations(self, model: Model) -> int | None:
        """Network evaluations of one run (a guided evaluation counts once); None where the solver decides."""
        per_step = SAMPLERS[self.sampler]
        if per_step is None:
            return None
        return (
            per_step * (self.steps - 1) + 1 if self._own_last_step(self._thresholded(model)) else per_step * self.steps
        )

    def _thresholded(self, model: Model) -> Model:
        if self.threshold == "none" or isinstance(model, Thresholded):
            return model
        return Thresholded(model, self.threshold, self.threshold_quantile)

    def _own_last_step(self, model: Model) -> bool:
        """Whether the step to t = 0 is one prediction of its own instead of a step of the solver."""
        if self.sampler in ("sde", "sde-heun"):
            return self.last_step != "none"
        # Where the velocity does not exist at 0, what is left there is the posterior mean.
        return self.sampler.startswith("ode") and model.time_range("velocity", eps=self.eps)[0] > 0

    def times(self, model: Model) -> list[float]:
        """The `steps` + 1 decreasing times of this sampler with this model; the last is 0, or where an SDE stops."""
        model = self._thresholded(model)
        interpolant = model.interpolant
        if self.sampler in ("ddpm", "ddim", "dpm-solver++"):
            if interpolant.num_steps is not None and self.spacing in ("uniform", "ddim"):
                return respaced_times(interpolant.num_steps, self.steps, self.spacing)
            # The last step jumps to t = 0 by the data prediction, so the model is never asked at 0 itself.
            t_min, t_max = model.time_range("data", "noise", eps=self.eps)
            grid = time_grid(interpolant, self.steps, 0.0, t_max, self.spacing)
            return grid if grid[-2] >= t_min else self._grid_and_zero(interpolant, t_min, t_max)
        if self.sampler in ("sde", "sde-heun"):
            t_min, t_max = model.time_range("velocity", "score", eps=self.eps)
            if not sde.ReverseSDE(model, self.diffusion).w(t_max).isfinite().all():
                t_max -= self.eps
            if self.last_step != "none":
                t_min = max(self.last_step_size, t_min)
        else:
            t_min, t_max = model.time_range("velocity", eps=self.eps)
        if self._own_last_step(model):
            return self._grid_and_zero(interpolant, t_min, t_max)
        return time_grid(interpolant, self.steps, t_min, t_max, self.spacing)

    def _grid_and_zero(self, interpolant: Interpolant, t_min: float, t_max: float) -> list[float]:
        """`steps` − 1 steps to t_min, and a last one to 0."""
        if self.steps < 2:
            raise MezzotintError(
                f"sampling.steps must be at least 2 for {self.sampler} with this model (the last is its own), got 1"
            )
        return [*time_grid(interpolant, self.steps - 1, t_min, t_max, self.spacing), 0.0]

    @torch.no_grad()
    def path(self, model: Model, x: Tensor, generator: Generators) -> Iterator[Tensor]:
        """Walk from x ~ p(x_t) at t = times(model)[0] to data; yields the state after every step.

        Random numbers come from `generator`; one generator per example makes each example independent of its batch.
        """
        times = self.times(model)
        model = self._thresholded(model)
        match self.sampler:
            case "ddpm":
                variance = self.variance
                if variance == "auto":
                    variance = "learned" if model.learned_variance else "lower"
                if variance == "learned" and not model.learned_variance:
                    raise MezzotintError("sampling.variance is 'learned', but this model has none; use lower or upper")
                yield from ddpm.ddpm(model, x, times, generator=generator, variance=variance)
            case "ddim":
                yield from ddpm.ddim(model, x, times, generator=generator, eta=self.eta)
            case "dpm-solver++":
                yield from multistep.dpm_solver_pp_2m(model, x, times)
            case "sde" | "sde-heun":
                solver = sde.euler_maruyama if self.sampler == "sde" else sde.stochastic_heun
                yield from solver(
                    model,
                    x,
                    times,
                    generator=generator,
                    diffusion=self.diffusion,
                    scale=self.diffusion_scale,
                    last_step=self.last_step,
                )
            case _:
                yield from self._ode(model, x, times)

    def _ode(self, model: Model, x: Tensor, times: list[float]) -> Iterator[Tensor]:
        own_last, last = self._own_last_step(model), times[-2]
        times = times[:-1] if own_last else times
        match self.sampler:
            case "ode-euler":
                states = ode.euler(model, x, times)
            case "ode-heun":
                states = ode.heun(model, x, times)
            case "ode-rk4":
                states = ode.rk4(model, x, times)
            case _:
                states = ode.dopri5(model, x, times, rtol=self.rtol, atol=self.atol)
        for state in states:
            x = state
            yield x
        if own_last:
            yield model(x, last).data

"""S4D, the diagonal state-space layer, as one convolution over a whole sequence (arXiv 2206.11893)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mezzotint.errors import MezzotintError, closest

Initialisation = Literal["lin", "inv", "real"]
Discretisation = Literal["zoh", "bilinear"]
LOG_DT = math.log(1e-3), math.log(1e-1)


class S4D(nn.Module):
    """A linear recurrence of `state` numbers for each channel, along the sequence (B, L, width) → (B, L, width).

        h_l = Ā h_{l−1} + B̄ u_l        y_l = Re Σ_n w C_n h_{l,n} + D u_l        A diagonal, B = 1

    `discretisation` zoh: Ā = e^{ΔA}, B̄ = (e^{ΔA} − 1)/A; bilinear: Ā = (1 + ΔA/2)/(1 − ΔA/2), B̄ = Δ/(1 − ΔA/2).
    `initialisation` of A with N = `state`: lin −½ + iπn, inv −½ + i(N/π)(N/(2n + 1) − 1), both of N/2 complex numbers,
    which stand for their conjugates too (w = 2); real −(n + 1), N numbers that stay real (w = 1). Δ is log-spaced over
    the channels in [1e-3, 1e-1]. A `bidirectional` layer has A, Δ and C twice, adds a recurrence that runs from the
    end, and costs no more: both are one convolution, with the kernel K_l = Re Σ_n w C_n B̄_n Ā_n^l to either side.

    All in float32 or better, also under autocast and where the network is cast to less: powers of Ā need it.
    Raises MezzotintError when `initialisation` or `discretisation` is unknown, and for an odd `state` with complex A.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        initialisation: Initialisation = "lin",
        discretisation: Discretisation = "zoh",
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        for word, value, known in (
            ("initialisation", initialisation, get_args(Initialisation)),
            ("discretisation", discretisation, get_args(Discretisation)),
        ):
            if value not in known:
                raise MezzotintError(f"{word} {value!r} is unknown; {closest(value, known)}")
        if initialisation != "real" and state % 2:
            raise MezzotintError(f"a state of {state} is not made of conjugate pairs; use an even number, or real A")
        self.discretisation = discretisation
        self.weight = 1 if initialisation == "real" else 2
        modes = state // self.weight
        shape = (2 if bidirectional else 1, width, modes)
        n = torch.arange(modes).expand(shape)
        self.log_dt = nn.Parameter(torch.linspace(*LOG_DT, width).expand(shape[:2]).clone())
        self.log_decay = nn.Parameter((n + 1.0 if initialisation == "real" else torch.full(shape, 0.5)).log())
        self.frequency: nn.Parameter | None = None  # A = −exp(log_decay) + i·frequency never leaves the left half-plane
        if initialisation == "lin":
            self.frequency = nn.Parameter(math.pi * n)
        elif initialisation == "inv":
            self.frequency = nn.Parameter(state / math.pi * (state / (2 * n + 1) - 1))
        real = torch.randn(shape)
        self.C = nn.Parameter(real if self.frequency is None else torch.stack([real, torch.randn(shape)], -1) / 2**0.5)
        self.D = nn.Parameter(torch.ones(width))
        self._known: tuple[int, Tensor, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S4D:
        def at_least_single(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(at_least_single, recurse)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, width) → (B, L, width), in the dtype of `u`."""
        length = u.shape[1]
        kind = u.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            signal = u.to(self.D.dtype)
            if torch.is_grad_enabled():
                y = Convolution.apply(signal, *self.modes(), self.D)
            else:
                y = _filtered(signal, self._kernel_spectrum(length))
        return y.to(u.dtype)

    def kernel(self, length: int) -> Tensor:
        """K_l, 0 ≤ l < length, of each direction and channel, without the skip D: (1 or 2, width, length)."""
        return kernel(*self.modes(), length)

    def modes(self) -> tuple[Tensor, Tensor]:
        """log a = log Ā and g = w C B̄ with K_l = Re Σ_n g_n a_n^l, complex, each (1 or 2, width, modes)."""
        log_a, b = self.discretised()
        c = self.C if self.frequency is None else torch.view_as_complex(self.C)
        return log_a, self.weight * c * b

    def discretised(self) -> tuple[Tensor, Tensor]:
        """log Ā and B̄, complex, each (1 or 2, width, modes)."""
        decay = self.log_decay.exp()
        a = torch.complex(-decay, torch.zeros_like(decay) if self.frequency is None else self.frequency)
        dt = self.log_dt.exp().unsqueeze(-1)
        if self.discretisation == "zoh":
            return dt * a, torch.expm1(dt * a) / a
        half = dt * a / 2
        return torch.log((1 + half) / (1 - half)), dt / (1 - half)

    def _kernel_spectrum(self, length: int) -> Tensor:
        """The spectrum of both kernels, kept between calls of evaluation for as long as no parameter changes.

        Parameters are compared by value: a fused optimizer step does not raise a tensor's version.
        """
        if self.training or torch.compiler.is_compiling() or self.D.device.type == "meta":
            return torch.fft.rfft(two_sided(self.kernel(length), self.D))
        now = torch.cat([parameter.flatten() for parameter in self.parameters()])
        if self._known is not None:
            before, values, spectrum = self._known
            same_place = values.device == now.device and values.dtype == now.dtype
            if before == length and same_place and torch.equal(values, now):
                return spectrum
        spectrum = torch.fft.rfft(two_sided(self.kernel(length), self.D))
        self._known = length, now, spectrum
        return spectrum

    def train(self, mode: bool = True) -> S4D:
        """As `nn.Module.train`; what evaluation kept is dropped."""
        self._known = None
        return super().train(mode)


class Convolution(torch.autograd.Function):
    """u (B, L, width) convolved with the kernels of modes, in each direction that they have, and with a skip (width,).

    log a and g (1 or 2, width, modes) are those of `S4D.modes`. Kept for the backward pass are `u` and the kernels'
    spectra, where plain operations keep padded copies, powers and kernels, too, and take complex FFTs; the powers are
    made again. Channels are taken in parts, so that nothing made on the way is large. Can be differentiated once.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, log_a: Tensor, g: Tensor, skip: Tensor) -> Tensor:
        y, spectra = torch.empty_like(u), []
        for part in _parts(u):
            by = torch.fft.rfft(two_sided(kernel(log_a[:, part], g[:, part], u.shape[1]), skip[part]))
            y[..., part] = _signal(_spectrum(u[..., part], 2 * (by.shape[-1] - 1)).mul_(by), u.shape[1])
            spectra.append(by)
        ctx.save_for_backward(u, log_a, g, *spectra)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        u, log_a, g, *spectra = ctx.saved_tensors
        length, n = u.shape[1], 2 * (spectra[0].shape[-1] - 1)
        by_u = torch.empty_like(u) if ctx.needs_input_grad[0] else None
        by_log_a, by_g, by_skip = torch.empty_like(log_a), torch.empty_like(g), u.new_empty(u.shape[2])
        for part, by in zip(_parts(u), spectra, strict=True):
            spectrum = _spectrum(grad[..., part], n)
            product = _spectrum(u[..., part], n).conj_physical_().mul_(spectrum)
            circular = torch.fft.irfft(product.sum(0), n)
            by_skip[part] = circular[:, 0]
            by_kernel = circular[None, :, :length]
            if len(g) == 2:  # `two_sided`, undone
                back = torch.cat([circular[:, :1], circular[:, n - length + 1 :].flip(-1)], dim=1)
                by_kernel = torch.stack([circular[:, :length], back])
            by_log_a[:, part], by_g[:, part] = kernel_gradient(log_a[:, part], g[:, part], by_kernel)
            if by_u is not None:
                by_u[..., part] = _signal(spectrum.mul_(by.conj()), length)
        return by_u, by_log_a, by_g, by_skip


def kernel(log_a: Tensor, g: Tensor, length: int) -> Tensor:
    """log a and g, complex (…, modes) → K_l = Re Σ_n g_n a_n^l, 0 ≤ l < length: (…, length).

    With l = s·i + j, a^l is the product of a^{s·i} and a^j, and the sum over n a matrix product of √L rows and columns
    a channel: 2·√L powers of a mode instead of L.
    """
    s, rows = _square(length)
    left = g.unsqueeze(-2) * powers(s * log_a, rows)
    # Re Σ x·y = Σ Re x·Re ȳ + Im x·Im ȳ: real and imaginary parts side by side are one real product.
    return (_real(left) @ _real(powers(log_a.conj(), s)).mT).flatten(-2)[..., :length]


def kernel_gradient(log_a: Tensor, g: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What `kernel` does to a gradient by K (…, length): those by log a and by g, matrix products of √L as well."""
    s, rows = _square(length := grad.shape[-1])
    i, j = (torch.arange(n, device=g.device, dtype=grad.dtype).unsqueeze(-1) for n in (rows, s))
    table = F.pad(grad, (0, rows * s - length)).unflatten(-1, (rows, s))
    # ∂K_l/∂g = a^l and ∂K_l/∂log a = l·g·a^l, summed over j first.
    columns, lines = powers(log_a.conj(), s), powers(s * log_a.conj(), rows)
    over_j = torch.view_as_complex((table @ _real(torch.cat([columns, j * columns], -1))).unflatten(-1, (-1, 2)))
    plain, times_j = over_j.chunk(2, dim=-1)
    by_log_a = g.conj() * (lines * (s * i * plain + times_j)).sum(-2)
    return by_log_a, (lines * plain).sum(-2)


def _square(length: int) -> tuple[int, int]:
    """Columns s and rows of a table of √length by √length that holds `length` numbers, row by row."""
    s = math.ceil(math.sqrt(length))
    return s, math.ceil(length / s)


def _real(z: Tensor) -> Tensor:
    """(…, n) complex → (…, 2n), real and imaginary parts in turn."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def two_sided(kernels: Tensor, skip: Tensor) -> Tensor:
    """Kernels (1 or 2, width, L) and the skip as a circular one (width, n): the second's lags count from the end.

    n = fast_length(2·L − 1), so that no end of a sequence meets the other.
    """
    length = kernels.shape[-1]
    circular = kernels.new_zeros(kernels.shape[1], fast_length(2 * length - 1))
    circular[:, :length] = kernels[0]
    if len(kernels) == 2:
        circular[:, 0] += kernels[1, :, 0]
        circular[:, circular.shape[1] - length + 1 :] = kernels[1, :, 1:].flip(-1)
    circular[:, 0] += skip
    return circular


def _filtered(u: Tensor, by: Tensor) -> Tensor:
    """u (B, L, width) with its spectrum multiplied by that of a kernel, `by` (width, n/2 + 1)."""
    y = torch.empty_like(u)
    for part in _parts(u):
        y[..., part] = _signal(_spectrum(u[..., part], 2 * (by.shape[-1] - 1)).mul_(by[part]), u.shape[1])
    return y


def _parts(u: Tensor) -> list[slice]:
    """Quarters of the channels, where these have so many numbers that what is made of all at once would be large."""
    width = u.shape[-1]
    step = math.ceil(width / 4) if u.numel() > 2**20 else width
    return [slice(k, k + step) for k in range(0, width, step)]


def _spectrum(u: Tensor, n: int) -> Tensor:
    """(B, L, width) → (B, width, n/2 + 1): padded and transposed in one copy, since an FFT is faster along the last."""
    return torch.fft.rfft(F.pad(u.transpose(1, 2), (0, n - u.shape[1])))


def _signal(spectrum: Tensor, length: int) -> Tensor:
    """(B, width, n/2 + 1) → (B, length, width), what `_spectrum` was taken of."""
    return torch.fft.irfft(spectrum, 2 * (spectrum.shape[-1] - 1))[..., :length].transpose(1, 2)


def powers(log_a: Tensor, count: int) -> Tensor:
    """a^0 … a^(count − 1) of log a (…, n), as (…, count, n), where |a| ≤ 1.

    Each pass doubles their number with one exponential, which counts as zero below the fourth root of the smallest
    normal number (3e-10 in float32): then no product of two powers is subnormal, which would be many times slower.
    """
    smallest = 0.25 * math.log(torch.finfo(log_a.real.dtype).tiny)
    result = log_a.new_empty(*log_a.shape[:-1], count, log_a.shape[-1])
    result[..., 0, :] = 1
    have = 1
    while have < count:
        more = min(have, count - have)
        factor = torch.exp(have * log_a).masked_fill(have * log_a.real < smallest, 0).unsqueeze(-2)
        result[..., have : have + more, :] = result[..., :more, :] * factor
        have += more
    return result


def fast_length(minimum: int) -> int:
    """The smallest even number without prime factors above 5 that is at least `minimum`: an FFT is fast there."""
    n = minimum + minimum % 2
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2

"""Networks that work on images while x, and the noise in it, are latents of patches (l-DAE, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mezzotint.errors import MezzotintError
from mezzotint.representations.tokenizer import PatchPCA, PatchTokenizer


class ImageSpace(nn.Module):
    """What stands between x and a network that is given images, gives images, or both.

    The network sees decode(x) = Uᵀx + mean; of an image that it predicts, x is encode(image) = V(image − mean), both
    in the units of x and neither clamped. All of it stays float32 under autocast. `tokenizer` is put in once it is
    fitted or read; until then using it raises `MezzotintError`.
    """

    def __init__(self, shape: Sequence[int], *, input: bool, output: bool) -> None:
        """shape: (d, h, w) of x. input, output: which sides of the network are images."""
        super().__init__()
        self.shape = tuple(shape)
        self.input, self.output = input, output
        self.tokenizer: PatchTokenizer | None = None

    def _tokenizer(self) -> PatchTokenizer:
        if self.tokenizer is None:
            raise MezzotintError(
                "this network works on images through a tokenizer that is not there; set representation.path to one "
                "that 'mezzotint fit-tokenizer' wrote, or train"
            )
        return self.tokenizer

    def to_network(self, x: Tensor) -> Tensor:
        """x (B, d, h, w) as the network's input."""
        if not self.input:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self._tokenizer().decode(x, clamp=False)

    def from_network(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output in x's space, and of an image what the latents leave out (`left_out`)."""
        if not self.output:
            return output, None
        with torch.autocast(output.device.type, enabled=False):
            tokenizer = self._tokenizer()
            return tokenizer.encode(output), left_out(tokenizer, output)


def left_out(tokenizer: PatchTokenizer, images: Tensor) -> Tensor | None:
    """What a patch PCA's d latents leave out of images (B, C, H, W), in units of x: (B, D − d, h, w).

    Of the components from d + 1 to D; None for other tokenizers, and for whitened latents, whose units differ.
    """
    if not isinstance(tokenizer, PatchPCA) or tokenizer.info.fit.whiten:
        return None
    return tokenizer.project(images, tokenizer.basis[tokenizer.channels :]) / tokenizer.latent_scale


class FullBasisEncoder:
    """Images to all D components of each patch, (B, D, h, w): x, and then `left_out`."""

    stochastic = False

    def __init__(self, tokenizer: PatchPCA) -> None:
        self.tokenizer = tokenizer

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """Raises `MezzotintError` as the tokenizer does."""
        rest = left_out(self.tokenizer, images)
        assert rest is not None
        return torch.cat([self.tokenizer.encode(images), rest], dim=1)

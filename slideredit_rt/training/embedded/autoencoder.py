"""Losses of the autoencoder of an embedded editor, whose latents are tied to known features of the image.

A diffusion model learns far faster on semantic latents (VA-VAE, arXiv 2501.01423). The features are low frequencies of each
patch and the shares of it that the parts of the drawing cover. They are known exactly, so the editor trains on them
independently of the autoencoder. Telling one part from another is easy for the encoder's convolutions, but a transformer of a
few blocks needs more steps for it than a recipe has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from slideredit_rt.training.embedded.loop import Losses

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""Images, `[N, 3, H, W]` in [−1, 1], and their ideal latents, by the number of the step and the batch size."""

_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


def _cosine_basis(size: int) -> Tensor:
    """Return the orthonormal DCT-II, `[frequency, position]`."""
    k, n = torch.arange(size)[:, None], torch.arange(size)[None, :]
    basis: Tensor = torch.cos(math.pi * (n + 0.5) * k / size) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def patch_filters(size: int, frequencies: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return orthonormal filters of square patches, float32 `[len(frequencies), 3, size, size]`.

    Args:
        size: Side of a patch in pixels.
        frequencies: Colour (0 for luminance, 1 and 2 for two colour differences), vertical and horizontal frequency of each.
    """
    basis, colours = _cosine_basis(size), torch.tensor(_COLOURS)
    colours = colours / colours.norm(dim=1, keepdim=True)
    return torch.stack([colours[c][:, None, None] * torch.outer(basis[u], basis[v]) for c, u, v in frequencies])


def _noise_like(latents: Tensor, step: int) -> Tensor:
    generator = torch.Generator(latents.device).manual_seed(step)
    return torch.randn(latents.shape, generator=generator, device=latents.device)


def autoencoder_losses(vae: AutoencoderKL, draw: Draw, batch: int) -> Callable[[int], Losses]:
    """Return the losses of an encoder that predicts the ideal latents and a decoder that reconstructs the image."""

    def losses(step: int) -> Losses:
        images, ideal = draw(step, batch)
        # bfloat16 halves the time of the convolutions on processors with matrix units.
        with torch.autocast(images.device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            mean = posterior.mean.float()
            # Latents predicted by the editor have errors of about this size.
            decoded = vae.decode(mean + 0.03 * _noise_like(mean, step)).sample
        error = decoded.float() - images
        squared = error.square().mean()
        return error.abs().mean() + 4 * squared + 2 * F.mse_loss(mean, ideal), squared

    return losses


def decoder_losses(vae: AutoencoderKL, draw: Draw, batch: int, ideal_share: float = 0.0) -> Callable[[int], Losses]:
    """Return the losses of the decoder alone. Its blur limits how close a suppressed edit can come to its source.

    Args:
        vae: Autoencoder, whose encoder is left as it is.
        draw: Batches.
        batch: Batch size.
        ideal_share: Share of the images that are decoded from their ideal latents, as the editor predicts them, instead of
            the encoder's.
    """
    exact = round(ideal_share * batch)

    def losses(step: int) -> Losses:
        images, ideal = draw(1_000_000 + step, batch)
        with torch.autocast(images.device.type, torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(images[exact:]).latent_dist.mean.float()
            latents = torch.cat([ideal[:exact], mean])
            decoded = vae.decode(latents + 0.02 * _noise_like(latents, step)).sample
        squared = (decoded.float() - images).square().mean()
        return squared, squared

    return losses

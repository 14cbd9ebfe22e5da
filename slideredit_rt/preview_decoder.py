"""A tiny autoencoder that decodes previews and partial images in place of the base's own autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from slideredit_rt.assets import resolve_decoder
from slideredit_rt.checkpoint import check_complete, load_components, quiet_libraries, read_weights
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.files import read_json


def decoder_folder(source: str | Path) -> Path:
    """Return the folder of a preview decoder, without reading its weights.

    Args:
        source: Folder or hub repository with an `AutoencoderTiny` saved by diffusers.

    Raises:
        SliderEditError: It cannot be found, or is another class.
    """
    folder = resolve_decoder(source)
    try:
        found = read_json(folder / "config.json").get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise SliderEditError(
            f"preview decoder {str(source)!r} has no readable config.json ({error}); give the folder of an AutoencoderTiny"
        ) from None
    if found != AutoencoderTiny.__name__:
        raise SliderEditError(
            f"preview decoder {str(source)!r} is of class {found}; "
            "give an AutoencoderTiny, such as madebyollin/taef1 for FLUX.1"
        )
    return folder


class PreviewDecoder:
    """Decoder of previews: diffusers' `AutoencoderTiny`, which reads the latents as the transformer has them.

    Args:
        family: Family of the base.
        pipeline: Pipeline of the base, whose device the autoencoder is moved to.
        vae: Tiny autoencoder for the base's latents, such as TAEF1 for FLUX.1.
        source: Name of the autoencoder, for messages.

    Raises:
        SliderEditError: The autoencoder has other latent channels than the base, or another number of pixels per latent.
    """

    def __init__(self, family: Family, pipeline: Any, vae: AutoencoderTiny, source: str) -> None:
        side = family.side(pipeline)
        channels, height = family.latent_grid(pipeline, family.draw_noise(pipeline, side, side, 0), side, side).shape[1:3]
        config = vae.config
        factor = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
        if (config.latent_channels, factor) != (channels, side // height):
            raise SliderEditError(
                f"preview decoder {source!r} has {config.latent_channels} latent channels and {factor} pixels per latent, but "
                f"this base has {channels} and {side // height}; give an AutoencoderTiny that was trained for this base"
            )
        self.family = family
        self.pipeline = pipeline
        self.vae = vae.to(pipeline.vae.device).requires_grad_(False).eval()
        # One image at a time, as the base's autoencoder decodes, so that memory does not grow with the batch.
        self.vae.enable_slicing()

    @classmethod
    def load(cls, source: str | Path, family: Family, pipeline: Any) -> PreviewDecoder:
        """Load a tiny autoencoder for a base.

        Args:
            source: Folder or hub repository with an `AutoencoderTiny` saved by diffusers.
            family: Family of the base.
            pipeline: Pipeline of the base.

        Raises:
            SliderEditError: It cannot be found, is another class, is damaged, or does not fit the base.
        """
        folder = decoder_folder(source)
        stored, options = read_weights(folder), {"dtype": pipeline.vae.dtype, "local_files_only": True}
        with quiet_libraries():
            vae = load_components(folder, lambda: AutoencoderTiny.from_pretrained(folder, **options))
        check_complete(vae.state_dict(), stored, folder)
        return cls(family, pipeline, vae, str(source))

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Decode latents `[B, latent_rows, C]` to images `[B, 3, height, width]` in [0, 1].

        An image that is not finite before or after the autoencoder is filled with NaN.
        """
        grid = self.family.latent_grid(self.pipeline, latents, height, width)
        pixels: Tensor = self.vae.decode(grid.to(self.vae.dtype), return_dict=False)[0]
        return self.family.to_images(self.pipeline, latents, pixels)

"""`Preparer`, which checks what an edit asks for and encodes its images and prompt for the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Conditioning, EncodedImages, Family
from slideredit_rt.images import ImageSource, read_images
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.spans import PromptToken, normalise, row_mask

T = TypeVar("T")


class Remember(Protocol):
    """Function that returns `encode()`, or the cached value of the same key (see `slideredit_rt.serving.cache`)."""

    def __call__(self, key: tuple[Hashable, ...], encode: Callable[[], T]) -> T: ...


def image_key(image: Image.Image) -> tuple[Hashable, ...]:
    """Return a key for an image's content: mode, size and a digest of its pixels."""
    return image.mode, image.size, hashlib.sha256(image.tobytes()).digest()


@dataclass(frozen=True)
class Prepared:
    """An encoded image and prompt with the rows of each slider, for any strengths.

    Attributes:
        prompt: Text that was encoded.
        instructions: Instruction of each of the K sliders.
        spans: Text rows of each slider.
        token_mask: Rows that each slider scales, bool `[K, S]`.
        conditioning: Encoded edit.
        members: Name of the bank's adapter that each slider scales; empty without a bank.
        settings: Requested settings, including steps.
        content: Key for the content of the edit, without seed, steps and strengths; empty without a cache.
    """

    prompt: str
    instructions: tuple[str, ...]
    spans: tuple[tuple[int, ...], ...]
    token_mask: Tensor
    conditioning: Conditioning
    members: tuple[str, ...] = ()
    settings: EditSettings = field(default_factory=EditSettings)
    content: tuple[Hashable, ...] = ()


@dataclass(frozen=True)
class Guidance:
    """Guidance of an edit.

    Attributes:
        scale: Scale of the embedded guidance; None for a family without it.
        true_cfg_scale: Scale of guidance with a negative pass; 1 runs without the pass.
        negative_prompt: Prompt of the negative pass; None without the pass.
    """

    scale: float | None
    true_cfg_scale: float
    negative_prompt: str | None = None


class _Encoder:
    """Encoder for the images and texts of one edit, with an optional cache."""

    def __init__(self, preparer: Preparer, images: Sequence[Image.Image], remember: Remember | None) -> None:
        self._preparer = preparer
        self._images = images
        self._remember = remember
        self.images_key = () if remember is None else tuple(map(image_key, images))
        self._text_key = self.images_key if preparer.family.text_reads_images else ()

    def _recall(self, key: tuple[Hashable, ...], encode: Callable[[], T]) -> T:
        with self._preparer.lock:
            return encode() if self._remember is None else self._remember(key, encode)

    def tokens(self, text: str) -> list[PromptToken]:
        family, pipeline = self._preparer.family, self._preparer.pipeline
        return self._recall(("tokens", text, self._text_key), lambda: family.tokenize(pipeline, text, self._images))

    def text(self, text: str) -> dict[str, Tensor]:
        family, pipeline = self._preparer.family, self._preparer.pipeline
        rows = family.max_text_rows(pipeline)
        return self._recall(
            ("text", text, self._text_key), lambda: family.encode_prompt(pipeline, [text], rows, [self._images])
        )

    def sources(self) -> EncodedImages:
        family, pipeline = self._preparer.family, self._preparer.pipeline
        sources = self._recall(("images", self.images_key), lambda: family.encode_sources(pipeline, self._images))
        if not family.reads_images_once:
            return sources
        keys_values = self._recall(("keys_values", self.images_key), lambda: self._preparer.read(sources))
        return family.with_read(sources, keys_values)


@dataclass(frozen=True)
class Preparer:
    """Preparation of edits, with the parts of an editor that it needs.

    Attributes:
        family: Base-model family.
        pipeline: diffusers pipeline that encodes.
        read: Function that returns the keys and values of encoded images, for a family that reads them once.
        controls: Kind and members of the adapter, which decide the rows of each slider.
        max_sliders: Largest number of sliders of an edit.
        guidance: Scales of an edit that does not set them.
        lock: Lock held during each encoding, because tokenizers, text encoders and autoencoders have state during a call.
    """

    family: Family
    pipeline: Any
    read: Callable[[EncodedImages], Tensor]
    controls: Controls
    max_sliders: int
    guidance: Guidance
    lock: AbstractContextManager[Any]

    @torch.no_grad()
    def prepare(
        self,
        image: ImageSource | Sequence[ImageSource],
        sliders: Sequence[Slider | str],
        settings: EditSettings,
        remember: Remember | None = None,
    ) -> Prepared:
        """Encode an image and a prompt and find the rows of each slider.

        Args:
            image: Image or images to edit, see `SliderEditor.prepare`.
            sliders: Instructions, or sliders, whose strengths are not used here.
            settings: Settings of the edit.
            remember: Cache for encodings, see `SliderEditor.prepare`; None encodes everything.

        Raises:
            SliderEditError: An image cannot be read, a setting is not valid for this base, there are too many sliders, or a
                slider's instruction is not in the prompt.
        """
        images = self._images_of(image)
        wanted = [s if isinstance(s, Slider) else Slider(s) for s in sliders]
        members = self._members_of(wanted)
        text = self._prompt_of(wanted, settings.prompt)
        guidance = self._guidance_of(settings)
        against = guidance.negative_prompt
        encode = _Encoder(self, images, remember)
        spans = self.controls.find_spans(text, wanted, encode.tokens(text), self.family.max_text_rows(self.pipeline))
        sources = encode.sources()
        noise = self.family.draw_noise(self.pipeline, sources.height, sources.width, settings.seed)
        conditioning = self.family.condition(
            sources,
            encode.text(text),
            None if against is None else encode.text(against),
            noise.to(self.pipeline.vae.device),
            guidance.scale,
            guidance.true_cfg_scale,
        )
        return Prepared(
            prompt=text,
            instructions=tuple(s.instruction for s in wanted),
            spans=tuple(map(tuple, spans)),
            token_mask=self._token_mask(spans, members, conditioning),
            conditioning=conditioning,
            members=members,
            settings=settings,
            content=() if remember is None else (encode.images_key, text, against, guidance.scale, guidance.true_cfg_scale),
        )

    def _images_of(self, image: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
        """Read RGB images, and check that the base edits as many."""
        images = read_images(image)
        if not images or (len(images) > 1 and not self.family.takes_several_images(self.pipeline)):
            raise SliderEditError(f"got {len(images)} images, but a {type(self.pipeline).__name__} edits one; pass one image")
        return images

    def _members_of(self, sliders: Sequence[Slider]) -> tuple[str, ...]:
        """Return the bank's adapter that each slider scales, () without a bank. Refuse too many or conflicting sliders."""
        if len(sliders) > self.max_sliders:
            raise SliderEditError(
                f"got {len(sliders)} sliders, but this engine takes at most {self.max_sliders}; rebuild it with --max-sliders"
            )
        return self.controls.members_of(sliders)

    def _prompt_of(self, sliders: Sequence[Slider], prompt: str | None) -> str:
        """Return the given prompt, or compose one from the instructions."""
        if prompt is not None:
            if not sliders:
                raise SliderEditError("no slider was given; pass at least one instruction of the prompt")
            return normalise(prompt)
        spoken = self.controls.spoken(sliders)
        if unspoken := next((s for s, stands in zip(sliders, spoken, strict=True) if not stands), None):
            raise SliderEditError(f"slider {unspoken.instruction!r} only names its adapter; pass a prompt as well")
        return compose_prompt([s.instruction for s in sliders])

    def _guidance_of(self, settings: EditSettings) -> Guidance:
        """Return the guidance of an edit with these settings."""
        family, default = self.family, self.guidance
        if settings.guidance_scale is not None and family.guidance_scale is None:
            raise SliderEditError(f"{family.name} has no embedded guidance; use the true-CFG scale (--true-cfg-scale)")
        true_cfg_scale = default.true_cfg_scale if settings.true_cfg_scale is None else float(settings.true_cfg_scale)
        if settings.negative_prompt is not None and settings.true_cfg_scale is None and true_cfg_scale <= 1:
            raise SliderEditError(
                "this editor runs without a negative pass by default, so a negative prompt has no effect; pass a true-CFG "
                "scale above 1 as well (--true-cfg-scale)"
            )
        scale = default.scale if settings.guidance_scale is None else float(settings.guidance_scale)
        against = family.negative_prompt if settings.negative_prompt is None else settings.negative_prompt
        return Guidance(scale, true_cfg_scale, against if true_cfg_scale > 1 else None)

    def _token_mask(self, spans: Sequence[Sequence[int]], members: Sequence[str], conditioning: Conditioning) -> Tensor:
        """Return the rows of each slider, bool `[K, S]`: its text rows for an ST adapter, all rows for a GST adapter."""
        if self.controls.kind == "st":
            return row_mask(spans, conditioning.text_rows)
        rows = conditioning.text_rows + conditioning.image_rows
        kinds = self.controls.kinds_of(members, len(spans))
        return row_mask([range(rows) if kind == "gst" else span for kind, span in zip(kinds, spans, strict=True)], rows)

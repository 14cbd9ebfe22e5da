"""Logic of the HTTP routes: turn request fields into a service request, and its images into a response."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request, Response
from PIL import Image

from slideredit_rt.assets import world_of
from slideredit_rt.editor import SliderEditor
from slideredit_rt.images import cannot_hold, grid_size
from slideredit_rt.samples import sample_of
from slideredit_rt.serving.answers import EventStream, Form, Running
from slideredit_rt.serving.body import Limits, read_edit
from slideredit_rt.serving.faults import Fault
from slideredit_rt.serving.image_files import OutputFormat, decode_image_file, image_bytes
from slideredit_rt.serving.requests import EditRequest
from slideredit_rt.serving.schemas import (
    MAX_SOURCES,
    EditFields,
    EngineInfo,
    Model,
    SpansFields,
    SpansResponse,
    SweepField,
    Token,
)
from slideredit_rt.serving.service import EditService
from slideredit_rt.settings import SEEDS
from slideredit_rt.sliders import Slider, compose_prompt
from slideredit_rt.spans import PromptToken, normalise
from slideredit_rt.strength import Strength

_DECODERS = 4

T = TypeVar("T")


class Tokens:
    """Thread-safe tokenizer of prompts.

    It has copies of the editor's tokenizers, so that it never waits for an encoding.
    """

    def __init__(self, editor: SliderEditor) -> None:
        self.editor = editor
        self.text_rows = editor.family.max_text_rows(editor.pipeline)
        self._pipeline = copy.copy(editor.pipeline)
        for name in ("tokenizer", "tokenizer_2", "processor"):
            if getattr(editor.pipeline, name, None) is not None:
                setattr(self._pipeline, name, copy.deepcopy(getattr(editor.pipeline, name)))
        self._lock = threading.Lock()

    def of(self, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        with self._lock:
            return self.editor.family.tokenize(self._pipeline, prompt, images)


class Api:
    """Logic of the HTTP routes.

    Args:
        service: Runs the edits.
        model: Model name for clients.
        limits: Limits of one request.
        preview_steps: Denoising steps of previews that do not set num_inference_steps.
    """

    def __init__(self, service: EditService, model: str, limits: Limits, preview_steps: int) -> None:
        self.service = service
        self.editor = service.editor
        self.limits = limits
        self.preview_steps = min(preview_steps, self.editor.default_steps)
        self.max_images = MAX_SOURCES if self.editor.family.takes_several_images(self.editor.pipeline) else 1
        self.tokens = Tokens(self.editor)
        self._workers = CapacityLimiter(_DECODERS)
        self._model, self._created = model, int(time.time())

    @property
    def model(self) -> Model:
        """The model with the adapters that can be chosen now."""
        return Model(id=self._model, created=self._created, engine=self._engine())

    def _engine(self) -> EngineInfo:
        editor = self.editor
        manifest = getattr(editor.engine, "manifest", None)
        return EngineInfo(
            kind=editor.kind,
            family=editor.family.name,
            backend="torch" if manifest is None else manifest.backend,
            precision=None if manifest is None else manifest.precision,
            adapters=list(editor.members),
            adapter_kinds=editor.controls.kinds_of(list(editor.members), 0),
            choices=[] if self.service.adapters is None else self.service.adapters.names(),
            own_adapter=editor.adapters is None or editor.adapter is not None,
            max_sliders=editor.max_sliders,
            num_inference_steps=editor.default_steps,
            guidance_scale=editor.default_guidance_scale,
            true_cfg_scale=editor.default_true_cfg_scale,
            slider_start=editor.default_slider_start,
            preview_steps=self.preview_steps,
            max_images=self.max_images,
            side=editor.family.side(editor.pipeline),
            world=world_of(editor.pipeline.name_or_path),
            sample_instructions=list(sample_of(editor.pipeline.name_or_path).instructions),
        )

    async def work(self, function: Callable[[], T]) -> T:
        """Run a function on one of a few threads, which bounds how many images are decoded at once."""
        return await to_thread.run_sync(function, limiter=self._workers)

    async def edit(self, request: Request) -> Response:
        """Handle a request for an edit.

        Raises:
            Fault: The body is malformed or over a limit.
            SliderEditError: The edit failed or is impossible.
            ClientDisconnect: The client closed the connection.
        """
        fields, files = await read_edit(request, EditFields, self.limits)
        edit, form = await self.work(lambda: self._submission(fields, files))
        with ExitStack() as stack:
            running = Running(self.service, edit, request.receive)
            stack.callback(running.close)
            if not fields.stream:
                images = await running.images()
                body = await self.work(lambda: form.response(images).model_dump_json())
                return Response(body, media_type="application/json")
            # Wait for the first event before sending the status, so that earlier failures get an error status.
            first = await running.next()
            stack.pop_all()
            return EventStream(running, first, form, self.work)

    def _submission(self, fields: EditFields, files: Sequence[bytes]) -> tuple[EditRequest, Form]:
        """Return the request to submit for these fields, and the format of its response."""
        self.check_model(fields.model)
        sliders = self._sliders(fields)
        strengths = self._strengths(fields, sliders)
        settings = fields.settings(self.preview_steps)
        images = self._sources(fields, files)
        self._check_size(fields.size, images)
        output_format = fields.output_format or "png"
        strip = None
        if fields.sweep is not None and fields.sweep.strip:
            strip = sliders[fields.sweep.slider].instruction, fields.sweep.slider
            size = grid_size(self.editor.edited_size(images), len(strengths), [""], strip[0])
            self._check_strip(size, output_format)
        partial_images = (fields.partial_images or 0) if fields.stream else 0
        request = EditRequest(
            image=images,
            sliders=sliders,
            strengths=strengths,
            settings=settings,
            consecutive_seeds=fields.sweep is None,
            interactive=fields.preview,
            timeout=self.limits.request_seconds,
            adapter=fields.adapter,
            partial_every=math.ceil(self.editor.number_of_steps(settings) / (partial_images + 1)) if partial_images else 0,
        )
        pixels_per_row = (2 * self.editor.pipeline.vae_scale_factor) ** 2
        others = list(images)
        del others[self.editor.family.sized_by]
        prompt = normalise(fields.prompt) if fields.prompt else compose_prompt([s.instruction for s in sliders])
        form = Form(
            output_format=output_format,
            compression=100 if fields.output_compression is None else fields.output_compression,
            seeds=request.seeds,
            strengths=strengths,
            strip=strip,
            text_tokens=sum(token.end > token.start for token in self.tokens.of(prompt, images)),
            pixels_per_row=pixels_per_row,
            other_rows=sum(math.prod(self.editor.edited_size([image])) // pixels_per_row for image in others),
        )
        return request, form

    def _strengths(self, fields: EditFields, sliders: Sequence[Slider]) -> tuple[tuple[Strength, ...], ...]:
        """Return the slider strengths of each image: the sliders' own n times, or those of a sweep."""
        own = tuple(slider.strength for slider in sliders)
        n = fields.n or 1
        if (sweep := fields.sweep) is not None:
            self._check_sweep(sweep, fields, len(sliders))
            return tuple((*own[: sweep.slider], s, *own[sweep.slider + 1 :]) for s in sweep.strengths)
        if (last := fields.seed + n - 1) not in SEEDS:
            message = f"seed is {fields.seed} and n is {n}, so the last seed would be {last}; the largest is {SEEDS[-1]}"
            raise Fault(400, message, param="seed", code="seed_too_large")
        return (own,) * n

    def _check_sweep(self, sweep: SweepField, fields: EditFields, sliders: int) -> None:
        if sweep.slider >= sliders:
            message = f"sweep.slider is {sweep.slider}, but the last slider has index {sliders - 1}"
            raise Fault(400, message, param="sweep.slider", code="no_such_slider")
        n = fields.n or 1
        if n > 1 or (sweep.strip and fields.stream):
            what, other = ("a sweep", "n > 1") if n > 1 else ("a strip", "stream")
            raise Fault(400, f"{what} cannot be combined with {other}; remove one of them", param="sweep", code="sweep_alone")

    def _check_strip(self, size: tuple[int, int], output_format: OutputFormat) -> None:
        if output_format != "png" and (reason := cannot_hold(output_format.upper(), size)) is not None:
            raise Fault(
                400,
                f"the strip has {size[0]}×{size[1]} pixels, too large for output_format {output_format!r} ({reason}); "
                "use png, or fewer strengths",
                param="output_format",
                code="strip_too_large",
            )

    def _sources(self, fields: EditFields, files: Sequence[bytes]) -> tuple[Image.Image, ...]:
        """Decode the images to edit: first the files of the form, then `image` and `images` in the fields."""
        texts = [("image", text) for text in ([fields.image] if isinstance(fields.image, str) else fields.image or [])]
        texts += [("images", image.image_url) for image in fields.images or []]
        count = len(files) + len(texts)
        if not 1 <= count <= self.max_images:
            wanted = "one" if self.max_images == 1 else f"1 to {self.max_images}"
            code = "one_image" if self.max_images == 1 else "number_of_images"
            raise Fault(400, f"{count} images were sent; send {wanted}, in the field image", param="image", code=code)
        sources = [*files, *(image_bytes(text, param) for param, text in texts)]
        names = ["the image"] if count == 1 else [f"image {number}" for number in range(1, count + 1)]
        return tuple(
            decode_image_file(data, name, max_pixels=self.limits.pixels, max_aspect=self.limits.aspect)
            for data, name in zip(sources, names, strict=True)
        )

    def _sliders(self, fields: EditFields) -> tuple[Slider, ...]:
        """Return the sliders, or one for the whole prompt if there are none."""
        if fields.sliders is not None:
            return tuple(s.slider() for s in fields.sliders)
        if fields.prompt is None:
            raise Fault(400, "the request has neither prompt nor sliders; give one of them", param="prompt", code="missing")
        return (Slider(fields.prompt, adapter=next(iter(self.editor.members), None)),)

    def _check_size(self, size: str | None, images: Sequence[Image.Image]) -> None:
        if size in (None, "auto"):
            return
        width, height = self.editor.edited_size(images)
        if size != f"{width}x{height}":
            message = f"size is {size[:40]!r}, but this image is edited at {width}x{height}; give that size, or auto"
            raise Fault(400, message, param="size", code="invalid_size")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            message = f"the model {name[:80]!r} is not served here; use {self._model!r}"
            raise Fault(404, message, param="model", code="model_not_found")

    def spans(self, fields: SpansFields) -> SpansResponse:
        """Return the tokens of a prompt, each with the slider that owns it."""
        sliders = [Slider(s.instruction, adapter=s.adapter) for s in fields.sliders]
        prompt = normalise(fields.prompt) if fields.prompt else compose_prompt([s.instruction for s in sliders])
        tokens = self.tokens.of(prompt)
        found = self.editor.controls.find_spans(prompt, sliders, tokens, self.tokens.text_rows)
        owners = {row: i for i, rows in enumerate(found) for row in rows}
        listed = [Token(text=t.text, start=t.start, end=t.end, slider=owners.get(t.row)) for t in tokens]
        return SpansResponse(prompt=prompt, tokens=listed, text_rows=self.tokens.text_rows)

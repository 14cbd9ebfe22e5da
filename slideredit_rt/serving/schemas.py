"""Pydantic models of requests and responses: OpenAI's image edits API, with sliders."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from slideredit_rt.serving.image_files import OutputFormat
from slideredit_rt.settings import SEEDS, EditSettings
from slideredit_rt.sliders import Slider
from slideredit_rt.strength import StrengthSchedule, linear_sweep

MAX_IMAGES = 10
MAX_SOURCES = 16
"""Maximum number of source images of an edit."""
MAX_SWEEP = 32
MAX_STEPS = 100
MAX_SLIDERS = 64
MAX_CHARACTERS = 4000
MAX_POINTS = 32
"""Maximum number of points of a strength schedule."""

_Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
_Strength = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Points = Annotated[list[tuple[_Fraction, _Strength]], Field(min_length=1, max_length=MAX_POINTS)]


def _form_of(strength: Any) -> str:
    return "(schedule)" if isinstance(strength, (list, tuple)) else "(number)"


_Movable = Annotated[
    Annotated[_Strength, Tag("(number)")] | Annotated[_Points, Tag("(schedule)")],
    Discriminator(_form_of),
]
TAGS = ("(number)", "(schedule)")
"""Forms of a strength, which pydantic names in the place of an error."""
_Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SliderField(_Strict):
    """One instruction of the prompt and its strength."""

    instruction: _Text = Field(description="part of the prompt, word for word")
    strength: _Movable = Field(
        1.0,
        description="0 suppresses the edit, 1 is the model's own edit, more exaggerates it; or a schedule: pairs of a "
        "fraction of the run and the strength there, such as [[0, 0], [0.3, 1]]",
    )
    adapter: str | None = Field(None, description="adapter that the slider scales, if the engine has several")

    def slider(self) -> Slider:
        """Return the slider.

        Raises:
            SliderEditError: The instruction is blank, or the schedule goes back in time.
        """
        schedule = StrengthSchedule(tuple(self.strength)) if isinstance(self.strength, list) else self.strength
        return Slider(self.instruction, schedule, self.adapter)


class SweepField(_Strict):
    """One image per strength of one slider, evenly spaced."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, serialize_by_alias=True)

    slider: int = Field(0, ge=0, description="index of the slider in `sliders`")
    first: _Strength = Field(alias="from", description="first strength")
    last: _Strength = Field(alias="to", description="last strength")
    count: int = Field(7, ge=2, le=MAX_SWEEP, description="number of strengths")
    strip: bool = Field(False, description="return the images side by side in one, labelled with their strengths")

    @property
    def strengths(self) -> list[float]:
        return linear_sweep(self.first, self.last, self.count)


class ImageReference(_Strict):
    """An image in the request."""

    image_url: str = Field(description="base64 data URL, such as data:image/png;base64,…; other URLs are not fetched")


class EditFields(_Strict):
    """An edit. OpenAI's fields that do not apply here are ignored; fields that are not listed are rejected."""

    prompt: _Text | None = Field(None, description="whole prompt; default: the instructions joined by ' and '")
    model: str | None = Field(None, description="model id from GET /v1/models; default: the model served")
    image: str | list[str] | None = Field(
        None, description="image as base64 or data URL, or a list if the engine takes several (max_images in GET /v1/models)"
    )
    images: list[ImageReference] | None = Field(None, description="images in the form of OpenAI's JSON API")
    sliders: list[SliderField] | None = Field(
        None, min_length=1, max_length=MAX_SLIDERS, description="sliders; default: one for the whole prompt, at strength 1"
    )
    adapter: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = Field(
        None, description="adapter to use, one of `choices` in GET /v1/models; default: the engine's own"
    )
    sweep: SweepField | None = None
    preview: bool = Field(False, description="run before full edits, and with fewer steps unless num_inference_steps is given")
    n: int | None = Field(
        None, ge=1, le=MAX_IMAGES, description="number of images, with the seeds seed, seed + 1, …; default: 1"
    )
    size: str | None = Field(None, description="auto, or the size at which the image is edited")
    seed: int = Field(
        EditSettings.seed,
        ge=0,
        le=SEEDS[-1],
        description="seed of the initial noise; with n images, the last seed, seed + n − 1, must be within the same range. "
        "JavaScript cannot represent all integers above 2⁵³ exactly",
    )
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; default: the engine's")
    guidance_scale: _Scale | None = Field(None, description="scale of the embedded guidance; default: the engine's")
    true_cfg_scale: _Scale | None = Field(
        None, description="scale of guidance with a negative pass, 1 for no such pass; default: the engine's"
    )
    negative_prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = Field(
        None, description="prompt of the negative pass; default: the family's"
    )
    slider_start: float | None = Field(
        None,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="fraction of the steps before the sliders act, which all strengths share; default: the engine's, usually 0",
    )
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = Field(None, description="format of the images; default: png")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP in percent; default: 100")
    stream: bool | None = Field(None, description="respond with server-sent events")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="number of partial images of each image in a stream; default: 0"
    )
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = Field(None, description="ignored")
    input_fidelity: str | None = Field(None, description="ignored")
    moderation: str | None = Field(None, description="ignored")
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")

    def settings(self, preview_steps: int) -> EditSettings:
        """Return the edit settings.

        Args:
            preview_steps: Denoising steps of a preview without num_inference_steps.
        """
        return EditSettings(
            prompt=self.prompt,
            seed=self.seed,
            steps=self.num_inference_steps or (preview_steps if self.preview else None),
            guidance_scale=self.guidance_scale,
            true_cfg_scale=self.true_cfg_scale,
            negative_prompt=self.negative_prompt,
            slider_start=self.slider_start,
        )


class SpansFields(_Strict):
    """A prompt and the sliders to find in it. Their strengths are ignored."""

    prompt: _Text | None = Field(None, description="whole prompt; default: the instructions joined by ' and '")
    sliders: list[SliderField] = Field(default_factory=list, max_length=MAX_SLIDERS)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorBody


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Rows that the backbone processed: tokens of the prompt, image rows of the sources and of the edits."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class EditedImage(BaseModel):
    b64_json: str
    seed: int = Field(description="seed of the image's initial noise")
    strengths: list[float | list[list[float]]] | None = Field(
        description="strength of each slider, a number or a schedule; null for a strip"
    )


class EditResponse(BaseModel):
    created: int
    background: Literal["opaque"] = "opaque"
    data: list[EditedImage]
    output_format: OutputFormat
    size: str
    usage: Usage


class EngineInfo(BaseModel):
    kind: str = Field(
        description="st: a slider scales its own words; gst: one slider scales everything, also for a bank of both kinds"
    )
    family: str
    backend: str
    precision: str | None = Field(description="precision of a quantised base, such as fp8; null if the base was not quantised")
    adapters: list[str] = Field(description="names of the adapters in a bank; empty if the engine has a single adapter")
    adapter_kinds: list[str] = Field(description="kind of each adapter in a bank, in the order of `adapters`")
    choices: list[str] = Field(
        description="names that `adapter` of a request can have; empty if the engine contains its adapter, and for a server "
        "without a folder of adapters"
    )
    own_adapter: bool = Field(description="true if the engine has an adapter of its own, for requests without `adapter`")
    max_sliders: int
    num_inference_steps: int = Field(description="denoising steps of a full edit by default")
    guidance_scale: float | None = Field(
        description="scale of the embedded guidance by default; null for a family that has none"
    )
    true_cfg_scale: float = Field(description="scale of guidance with a negative pass by default; 1 for no such pass")
    slider_start: float = Field(description="fraction of the steps before the sliders act by default")
    preview_steps: int = Field(description="denoising steps of a preview by default")
    max_images: int = Field(description="maximum number of source images of an edit")
    side: int = Field(description="width and height of the square images that the engine edits, in pixels")
    world: str | None = Field(description="world of an editor that is part of the package; null for other bases")
    sample_instructions: list[str] = Field(description="instructions for the image at /sample.png")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "slideredit-rt"
    engine: EngineInfo


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Token(BaseModel):
    text: str
    start: int = Field(description="index of the token's first character in the prompt")
    end: int = Field(description="index after its last character")
    slider: int | None = Field(description="index of the slider that owns the token; null if there is none")


class SpansResponse(BaseModel):
    prompt: str
    tokens: list[Token]
    text_rows: int = Field(description="number of text rows that the backbone reads")


class Health(BaseModel):
    status: Literal["ok", "closed"]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool

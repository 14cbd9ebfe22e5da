"""What requests hold and what answers hold, as pydantic models: OpenAI's image edits, with sliders."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slideredit_rt.serving.image_files import OutputFormat
from slideredit_rt.settings import SEEDS, EditSettings
from slideredit_rt.sliders import linear_sweep

MAX_IMAGES = 10
MAX_SOURCES = 16
"""Most source images of an edit."""
MAX_SWEEP = 32
MAX_STEPS = 100
MAX_SLIDERS = 64
MAX_CHARACTERS = 4000

_Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
_Strength = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
_Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SliderField(_Strict):
    """One instruction of the prompt and its strength."""

    instruction: _Text = Field(description="words of the prompt, exactly as they stand there")
    strength: _Strength = Field(1.0, description="0 suppressed, 1 the model's own edit, above 1 exaggerated")
    adapter: str | None = Field(None, description="which adapter it scales, where the engine has several")


class SweepField(_Strict):
    """One image per strength of one slider, evenly spaced."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, serialize_by_alias=True)

    slider: int = Field(0, ge=0, description="index in `sliders`")
    first: _Strength = Field(alias="from")
    last: _Strength = Field(alias="to")
    count: int = Field(7, ge=2, le=MAX_SWEEP)
    strip: bool = Field(False, description="answer with one image in which they lie side by side under their strengths")

    @property
    def strengths(self) -> list[float]:
        return linear_sweep(self.first, self.last, self.count)


class ImageReference(_Strict):
    """An image in the request."""

    image_url: str = Field(description="data:image/png;base64,… (other URLs are not fetched)")


class EditFields(_Strict):
    """An edit. Of OpenAI's fields those that could change nothing here are ignored; a field that is not listed is refused."""

    prompt: _Text | None = Field(None, description="default: the instructions joined by ' and '")
    model: str | None = Field(None, description="as GET /v1/models names it; default: the one there is")
    image: str | list[str] | None = Field(
        None, description="base64 or data URL; a list where the engine takes several (max_images of GET /v1/models)"
    )
    images: list[ImageReference] | None = None
    sliders: list[SliderField] | None = Field(
        None, min_length=1, max_length=MAX_SLIDERS, description="default: the whole prompt at strength 1"
    )
    sweep: SweepField | None = None
    preview: bool = Field(
        False, description="ahead of full edits, and with fewer steps unless num_inference_steps says how many"
    )
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="images, with the seeds seed, seed + 1, …")
    size: str | None = Field(None, description="auto, or the size that the engine edits the image at")
    seed: int = Field(
        EditSettings.seed,
        ge=0,
        le=SEEDS[-1],
        description="of the initial noise; with n images, the last one's is seed + n − 1 and within the same range. JavaScript "
        "keeps no number above 2⁵³ exactly",
    )
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: _Scale | None = None
    true_cfg_scale: _Scale | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = Field(None, description="default: png")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP in percent; default: 100")
    stream: bool | None = Field(None, description="answer with server-sent events")
    partial_images: int | None = Field(None, ge=0, le=3, description="of each image, in a stream; default: 0")
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = Field(None, description="ignored")
    input_fidelity: str | None = Field(None, description="ignored")
    moderation: str | None = Field(None, description="ignored")
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")

    def settings(self, preview_steps: int) -> EditSettings:
        """The settings that these fields say; `preview_steps` of a preview that names none."""
        return EditSettings(
            prompt=self.prompt,
            seed=self.seed,
            steps=self.num_inference_steps or (preview_steps if self.preview else None),
            guidance_scale=self.guidance_scale,
            true_cfg_scale=self.true_cfg_scale,
            negative_prompt=self.negative_prompt,
        )


class SpansFields(_Strict):
    """A prompt and the sliders to find in it; their strengths do not matter."""

    prompt: _Text | None = Field(None, description="default: the instructions joined by ' and '")
    sliders: list[SliderField] = Field(default_factory=list, max_length=MAX_SLIDERS)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorBody


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Rows that the backbone worked on: the prompt's tokens, the source images' rows, the edits' rows."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class EditedImage(BaseModel):
    b64_json: str
    seed: int = Field(description="of its initial noise")
    strengths: list[float] | None = Field(description="one per slider; null for a strip")


class EditResponse(BaseModel):
    created: int
    background: Literal["opaque"] = "opaque"
    data: list[EditedImage]
    output_format: OutputFormat
    size: str
    usage: Usage


class EngineInfo(BaseModel):
    kind: str = Field(description="st: a slider scales its own words; gst: one slider scales everything")
    family: str
    backend: str
    adapters: list[str] = Field(description="of a bank, by name; empty where there is one, without a name")
    max_sliders: int
    num_inference_steps: int = Field(description="default of a full edit")
    preview_steps: int = Field(description="default of a preview")
    max_images: int = Field(description="source images that an edit may have")
    side: int = Field(description="edge in pixels of the square that the engine edits")
    embedded: bool = Field(description="whether it is the small editor of shapes that the package brings")


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
    start: int = Field(description="first character in the prompt")
    end: int
    slider: int | None = Field(description="index of the slider that owns it")


class SpansResponse(BaseModel):
    prompt: str
    tokens: list[Token]
    text_rows: int = Field(description="that the backbone reads")


class Health(BaseModel):
    status: Literal["ok", "closed"]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool

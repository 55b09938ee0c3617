"""Requests and answers of the API: OpenAI's fields with their limits.

A null is a missing field. Unknown fields are refused, and so is a known one whose value would change the answer and is
not supported by this model. Values that ask for nothing (`tools` [], `logit_bias` {}) and fields that change nothing
(`user`, `moderation`) are accepted and have no effect. The fields that OpenAI does not have (`seed`,
`negative_prompt`, `num_inference_steps`, `guidance_scale`) are diffusers'; `layout`, and `warnings` of an answer, are
our own.
"""

import secrets
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from spar.common.limits import MAX_IMAGE_TILES, MAX_SEED, one_reference
from spar.serving import limits

Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(min_length=1, max_length=limits.MAX_PROMPT_CHARACTERS)]
# A larger value is cut, not refused: clients and benchmark kits request thousands by default.
AnswerTokens = Annotated[int, Field(ge=1, description=f"At most {limits.MAX_ANSWER_TOKENS}; more is cut to that.")]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Nothing = Annotated[list[Any], Field(max_length=0)]
NoFields = Annotated[dict[str, Any], Field(max_length=0)]
Temperature = Annotated[
    float, Field(ge=0, le=2, description="0, the default, takes the likeliest word each time, above it words are drawn")
]
ServiceTier = Literal["auto", "default"]
Detail = Literal["auto", "low", "high"]
OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "standard", "hd", "low", "medium", "high"]


def sides(size: str | None) -> tuple[int | None, int | None]:
    """Height and width of a size, None for the model's own."""
    if size in (None, "auto"):
        return None, None
    width, height = map(int, size.split("x"))
    return height, width


def _area(size: str) -> str:
    height, width = sides(size)
    if height and width and height * width > limits.MAX_OUTPUT_PIXELS:
        raise ValueError(f"expected at most {limits.MAX_OUTPUT_PIXELS} pixels, got {size}")
    return size


Size = Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$"), AfterValidator(_area)]


def _switch(value: Any) -> Any:
    """A layout that is true or false, also of a form, whose values are text."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


class RequestModel(BaseModel):
    """An object without unknown fields; with very many, it is refused before each gets an error of its own."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > limits.MAX_FIELDS:
            raise ValueError(f"expected at most {limits.MAX_FIELDS} fields")
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StrictModel(RequestModel):
    """A JSON object, whose types are strict; the values of a form are text."""

    model_config = ConfigDict(strict=True)


class SamplingRequest(RequestModel):
    """Fields that `/v1/images/generations` and `/v1/images/edits` share."""

    prompt: Text
    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_N)] | None = 1
    response_format: Literal["b64_json"] | None = Field(None, description="This server hosts no files.")
    output_format: OutputFormat | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(None, description="Image i uses seed + i.")
    negative_prompt: Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARACTERS)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=limits.MAX_GUIDANCE)] | None = None
    quality: Quality | None = Field(None, description="Changes nothing: there is one quality.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: bool | None = Field(None, description="Events of one image as it comes.")
    partial_images: Annotated[int, Field(ge=0, le=limits.MAX_PARTIAL_IMAGES)] | None = Field(
        None, description="Previews of a streamed image; at most one a step."
    )
    layout: Annotated[Text | bool, BeforeValidator(_switch)] | None = Field(
        None,
        description="Where everything lies, of an edit what changes, in words; true: as the model writes it; "
        "false: draw of the prompt.",
    )
    user: Name | None = None

    @model_validator(mode="after")
    def _last_seed(self) -> "SamplingRequest":
        if self.seed is not None and self.seed + (self.n or 1) - 1 > MAX_SEED:
            raise ValueError(f"seed: expected at most {MAX_SEED} for the last image")
        return self

    @model_validator(mode="after")
    def _streamed_alone(self) -> "SamplingRequest":
        if self.stream and (self.n or 1) > 1:
            raise ValueError(f"n: expected 1 with stream, got {self.n}")
        if self.partial_images and not self.stream:
            raise ValueError(f"partial_images: expected 0 without stream, got {self.partial_images}")
        return self


class GenerationRequest(SamplingRequest):
    """Body of /v1/images/generations."""

    model_config = ConfigDict(strict=True)

    size: Size | None = Field(None, description='Width x height in pixels, or "auto"; exactly this size, or refused.')


class EditForm(SamplingRequest):
    """Form of /v1/images/edits."""

    image: UploadFile = Field(description="PNG, JPEG or WEBP of one frame; its name is not used.")
    size: Size | None = Field(None, description="auto, or the result's own size: it has the image's proportions.")

    @model_validator(mode="before")
    @classmethod
    def _list_of_one(cls, data: Any) -> Any:
        """Accept one image as `image[]`, the name that OpenAI's clients give to a list."""
        if isinstance(data, dict) and "image[]" in data and "image" not in data:
            if isinstance(data["image[]"], list):
                raise ValueError(f"image: {one_reference(len(data['image[]']))}")
            return {"image" if name == "image[]" else name: value for name, value in data.items()}
        return data


class ReconstructForm(RequestModel):
    """Form of /v1/reconstruct."""

    image: UploadFile = Field(description="PNG, JPEG or WEBP of one frame; its name is not used.")
    model: Name | None = None
    output_format: OutputFormat | None = None


class TextPart(StrictModel):
    """Text of a chat message; an empty one beside other parts asks for nothing."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARACTERS)]


class ImageUrl(StrictModel):
    """Where an image of a chat message is: a data URL."""

    url: str = Field(description="data:image/...;base64,... and no other URL: this server fetches nothing.")
    detail: Detail | None = None


class ImagePart(StrictModel):
    """Image of a chat message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(StrictModel):
    """Message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Field(max_length=limits.MAX_PROMPT_CHARACTERS), Tag("words")]  # an assistant's may be empty
        | Annotated[list[Part], Field(min_length=1, max_length=limits.MAX_PARTS), Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "words"),
    ]
    name: Name | None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None

    @property
    def texts(self) -> list[str]:
        """Its texts in order, without its images."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if isinstance(part, TextPart)]


class StreamOptions(StrictModel):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(StrictModel):
    """The form of an answer, of which there is one."""

    type: Literal["text"]


class AnswerRequest(StrictModel):
    """Fields that `/v1/chat/completions` and `/v1/responses` share."""

    def sampling(self) -> tuple[float, float, int | None]:
        """Temperature, top-p, and the seed, which is drawn here if none is given; None where nothing is drawn."""
        seed = getattr(self, "seed", None)
        drawn = secrets.randbelow(2**32) if seed is None else seed % (MAX_SEED + 1)
        return self.temperature or 0.0, self.top_p or 1.0, drawn if self.temperature else None

    model: Name | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tiles: Annotated[int, Field(ge=1, le=MAX_IMAGE_TILES)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: NoFields | None = None
    service_tier: ServiceTier | None = None
    store: Literal[False] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None


class ChatRequest(AnswerRequest):
    """Fields of `/v1/chat/completions`; penalties and other settings that no answer of ours has ask for nothing."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    stream_options: StreamOptions | None = None
    max_completion_tokens: AnswerTokens | None = None
    max_tokens: AnswerTokens | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    repetition_penalty: One | None = None
    min_p: Zero | None = None
    top_k: Literal[-1, 0] | None = None
    n: Literal[1] | None = None
    seed: int | None = None
    logprobs: Literal[False] | None = None
    stop: Nothing | None = None
    logit_bias: NoFields | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    response_format: TextFormat | None = None


class ImageItem(BaseModel):
    """A generated image."""

    b64_json: str
    seed: int | None = Field(None, description="The seed that reproduces this image.")
    revised_prompt: str | None = Field(None, description="The layout that the image was drawn of, if there is one.")


# What of a request is outside the model's world, which OpenAI's answers do not have; missing where nothing is.
Warnings = Annotated[list[str] | None, Field(description="What is outside the model's world: expect a guess there.")]


def warnings_field(notes: list[str]) -> dict[str, list[str]]:
    """The field of an answer that OpenAI does not have, where there is something to say."""
    return {"warnings": notes} if notes else {}


class ImagesResponse(BaseModel):
    """Generated images."""

    created: int
    data: list[ImageItem]
    output_format: OutputFormat
    size: str
    warnings: Warnings = None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One answer of a completion."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    warnings: Warnings = None


class ModelInfo(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "spar"


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(BaseModel):
    """Whether the server can answer."""

    status: Literal["ok", "stopping"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail

"""What requests may hold and what answers look like, as OpenAI's API has them.

A field that would change the answer and is not done is refused by name; one that would not is dropped; an unknown one
is refused, since it may be either.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from trimtab.serve.engine import FinishReason

_DROPPED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_NOT_DONE: dict[str, tuple[Any, ...]] = {  # with the values that ask for nothing
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def _unicode(text: str) -> str:
    """JSON may hold half a surrogate pair, which is no text."""
    text.encode()
    return text


String = Annotated[str, AfterValidator(_unicode)]


def _nullable(schema: dict[str, Any]) -> None:
    """JSON's null stands for what is left out; see `_Body`."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Body(BaseModel):
    """A JSON object of a request.

    Null is as good as leaving a field out. No value is read as another type, but 1.0 is an integer to JSON.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _sift(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = {name: _whole(value) for name, value in data.items() if value is not None and name not in _DROPPED}
        for name in given.keys() & _NOT_DONE.keys() - cls.model_fields.keys():
            if given.pop(name) not in _NOT_DONE[name]:
                raise PydanticCustomError("unsupported_parameter", "not supported by this server", {"param": name})
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in (name for name in given if name not in known):
            if near := get_close_matches(name, known, 1):
                said = f"not a parameter of this request; did you mean {near[0]!r}?"
                raise PydanticCustomError("extra_forbidden", said, {"param": name})
        return given


class StreamOptions(_Body):
    """What a stream says beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Ignored.")


class Prompt(_Body):
    """What names a model and an edit of it."""

    model: String = Field(max_length=512, description="The base model, an adapter, or `base:adapter`.")
    reft_scale: float = Field(1.0, ge=-100, le=100, description="Strength of the adapter's edit.")


Word = Annotated[String, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class BroughtAdapter(_Body):
    """An adapter that comes with its request, and goes with it."""

    config: dict[str, Any] = Field(description="What adapter_config.json holds.")
    weights: String = Field(description="What adapter_model.safetensors holds, in base64.")


class ScaledAdapter(_Body):
    """One of several adapters of a request."""

    name: String = Field(max_length=512)
    scale: float = Field(1.0, ge=-100, le=100, description="Strength of its edit.")


class AnyText(_Body):
    """Whatever the model writes."""

    type: Literal["text"]


class AnyJson(_Body):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Body):
    """A JSON schema; the name and the description are for the reader."""

    name: String = Field(max_length=64)
    description: String | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(True, description="Ignored: the schema is always kept to.")


class JsonOfSchema(_Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[AnyText | AnyJson | JsonOfSchema, Field(discriminator="type")]


class Generation(Prompt):
    """What chat and plain completions have in common."""

    reft_adapters: Annotated[list[String | ScaledAdapter], Field(max_length=8)] = Field(
        [], description="Several by name, in the order in which they edit; `model` is the base then."
    )
    reft_adapter: BroughtAdapter | None = Field(None, description="Instead of one by name, where the server allows it.")
    reft_moves: bool = Field(False, description="Say how far the edits move each token of the prompt.")
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 or -1: all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Word | Annotated[list[Word], Field(max_length=16)] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    response_format: ResponseFormat = Field(AnyText(type="text"), description="The form that answers are held to.")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: String


class Message(_Body):
    """A turn of a conversation. One of the assistant's at its end is continued."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: String | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: String | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, description="The assistant's, instead of content or with it.")
    tool_call_id: String | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing", "give content, or the assistant's tool_calls")
        return self


class FunctionName(_Body):
    """Of one of the tools."""

    name: String


class NamedTool(_Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(Generation):
    """A conversation to answer."""

    messages: Messages
    tools: list[dict[str, Any]] = Field([], description="Functions that the model may call, one an answer.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool = Field(
        "auto", description="none: they are written into the prompt, and the answer is text."
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def chosen_tools(self) -> str:
        """none, auto, required, or the name of one."""
        choice = self.tool_choice
        return choice.function.name if isinstance(choice, NamedTool) else choice if self.tools else "none"

    @model_validator(mode="after")
    def _one_form(self) -> ChatRequest:
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise PydanticCustomError("invalid_value", "there are no tools to choose from", {"param": "tool_choice"})
        if self.chosen_tools != "none" and not isinstance(self.response_format, AnyText):
            said = "go without a response_format, unless tool_choice is none"
            raise PydanticCustomError("unsupported_parameter", said, {"param": "tools"})
        return self


Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Generation):
    """Texts, or token ids, to continue."""

    prompt: String | Ids | Annotated[list[String], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: int = Field(16, ge=0, description="0 with echo and logprobs scores the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


class TokenizeRequest(_Body):
    """A text, or a conversation that goes through the chat template."""

    model: String | None = None
    prompt: String | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("invalid_value", "give this or messages, one of the two", {"param": "prompt"})
        return self


class LoadAdapter(_Body):
    """By vLLM's names, whatever the kind of adapter."""

    lora_name: String
    lora_path: String | None = Field(None, description="Below the server's folder of adapters.")
    reft_adapter: BroughtAdapter | None = Field(None, description="Instead of lora_path: the adapter itself.")
    load_inplace: bool = Field(False, description="Replace the adapter of this name, if there is one.")

    @model_validator(mode="after")
    def _one(self) -> LoadAdapter:
        if (self.lora_path is None) == (self.reft_adapter is None):
            code = "missing" if self.lora_path is None else "invalid_value"
            raise PydanticCustomError(code, "give this or reft_adapter, one of the two", {"param": "lora_path"})
        return self


class UnloadAdapter(_Body):
    """By vLLM's name."""

    lora_name: String


# Answers.


class TopLogprob(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One for each token."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """One for each token, in lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Cached(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request. A prompt counts once, however many answers it gets."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: Cached = Cached()


class CalledFunction(BaseModel):
    """By name, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model makes."""

    index: int | None = None
    """In a stream."""
    id: str
    type: Literal["function"]
    function: CalledFunction


class Said(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] | None = None
    content: str | None = ""
    tool_calls: list[ToolCall] | None = None


class Moves(BaseModel):
    """The prompt as the model reads it, and how far its tokens are moved."""

    tokens: list[str]
    moves: list[float]
    """The length of the change over that of the hidden state, summed over layers; 0 where nothing is edited."""


class ChatChoice(BaseModel):
    """With `message` in a whole answer, with `delta` in a part of one."""

    index: int
    message: Said | None = None
    delta: Said | None = None
    reft_moves: Moves | None = None
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | Literal["tool_calls"] | None = None


class TextChoice(BaseModel):
    """An answer, or a part of one."""

    index: int
    text: str
    reft_moves: Moves | None = None
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletion(BaseModel):
    """An answer to a conversation, or a part of a stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class Completion(BaseModel):
    """Continued texts, or a part of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """The base model, or an adapter on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trimtab"
    root: str
    parent: str | None = None
    max_model_len: int
    chat: bool
    """Whether the tokenizer has a chat template."""
    reft_moves: bool
    """Whether requests may ask for them."""


class ModelList(BaseModel):
    """All there are."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    """A text as the model reads it."""

    count: int
    max_model_len: int
    tokens: list[int]


class Health(BaseModel):
    """starting, ready or draining."""

    status: str


class Deleted(BaseModel):
    """An adapter that is no more."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An answer that is an error."""

    error: ErrorDetail

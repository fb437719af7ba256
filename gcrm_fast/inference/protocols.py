"""The shapes of requests, read strictly: a body that does not fit is answered 422 with the field and the reason."""

from collections.abc import Mapping, Sequence
from email.message import Message
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from gcrm_fast.inference.batcher import Context, Text

# How pydantic names the alternatives of a field in the location of an error; and the first word of its types of errors.
ALTERNATIVES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "list[str]": "a list of texts",
    "list[dict[str,any]]": "a list of messages",
}
EXPECTED = {
    "string": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
}
MOST_ROWS = 1024  # of a stream
Shape = TypeVar("Shape", bound=BaseModel)
Objects = list[dict[str, Any]]  # messages or tools, which data/messages.py checks


class RewardRequest(BaseModel):
    """OpenRLHF's: ``query`` is prompt + completion; given ``prompts``, samples share their forward."""

    query: list[str]
    prompts: list[str] | None = None

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
        """Prompts and completions, without the padding that OpenRLHF may have left around the query.

        Where the prompt ends does not change the reward.
        """
        prompts = self.prompts or [""] * len(self.query)
        check_length("prompts", prompts, "query", self.query)
        queries = [_strip(query, prompt, tokenizer) for query, prompt in zip(self.query, prompts, strict=True)]
        prompts = [prompt if query.startswith(prompt) else "" for query, prompt in zip(queries, prompts, strict=True)]
        return prompts, [query.removeprefix(prompt) for query, prompt in zip(queries, prompts, strict=True)]


class ScoreRequest(BaseModel):
    """``cuts`` marks completions that a length limit cut; ``tools`` and ``system`` have an entry per prompt, null for
    none; ``goal`` names one of the model's goal states. ``task`` or ``reference`` asks for the hybrid reward."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str | Objects]
    completions: list[str | Objects]
    cuts: list[StrictBool] | None = None
    tools: list[Objects | None] | None = None
    system: list[str | None] | None = None
    goal: Annotated[str | None, Field(min_length=1)] = None
    task: list[str | None] | None = None
    reference: list[str | int | float | Objects | None] | None = None

    def texts(self) -> tuple[list[Text], list[Text], list[Context]]:
        """Prompts and completions, as text or messages, and what goes with them."""
        for name in ("prompts", "cuts", "tools", "system", "task", "reference"):
            if (values := getattr(self, name)) is not None:
                check_length(name, values, "completions", self.completions)
        nothing = [None] * len(self.completions)
        contexts = zip(self.tools or nothing, self.system or nothing, strict=True)
        return [*self.prompts], [*self.completions], [{"tools": tools, "system": system} for tools, system in contexts]


class OpenRequest(BaseModel):
    """A stream: its prompt as text or messages, or as ``prompt_ids`` of the model's tokenizer; the number of its rows;
    the Q-value below which a row is dropped (null: none is)."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | Objects | None = None
    prompt_ids: list[StrictInt] | None = None
    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None
    goal: Annotated[str | None, Field(min_length=1)] = None
    tools: Objects | None = None
    system: str | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ValueError("give one of the fields 'prompt' and 'prompt_ids'")
        return self


class Chunk(BaseModel):
    """What was written of a row since the last chunk, as ids or as text. ``end``: it ended by itself (stop), or a limit
    cut it (length)."""

    model_config = ConfigDict(extra="forbid")
    row: StrictInt
    ids: list[StrictInt] | None = None
    text: str | None = None
    end: Literal["stop", "length"] | None = None

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if (self.ids is None) == (self.text is None):
            raise ValueError("give one of the fields 'ids' and 'text'")
        return self


class PushRequest(BaseModel):
    """Chunks of running rows, up to one per row, and rows that the client drops."""

    model_config = ConfigDict(extra="forbid")
    chunks: list[Chunk] = []
    drop: list[StrictInt] = []


class VllmRequest(BaseModel):
    """vLLM's /classify and /pooling: whole texts, or one conversation with its answer.

    Fields that would change the answer are refused; an activation does not (reward models have none).
    """

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    input: str | list[str] | None = None
    messages: Objects | None = None
    tools: Objects | None = None
    task: Literal["classify"] | None = None
    encoding_format: Literal["float"] = "float"
    add_special_tokens: Literal[True] = True
    use_activation: bool | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int = 0

    def texts(self) -> tuple[list[Text], list[Text], list[Context]]:
        """Prompts, completions and tools: texts have an empty prompt, messages end with the completion."""
        if (self.input is None) == (self.messages is None):
            raise HTTPException(422, "give one of the fields 'input' and 'messages'")
        if self.messages is not None:
            return [self.messages[:-1]], [self.messages[-1:]], [{"tools": self.tools}]
        if self.tools:
            raise HTTPException(422, "field 'tools' goes with 'messages': a text already contains its tools")
        texts: list[Text] = [self.input] if isinstance(self.input, str) else list(self.input or [])
        return [""] * len(texts), texts, [{}] * len(texts)


def parse(shape: type[Shape], body: bytes | bytearray) -> Shape:
    """The body, JSON, as ``shape``. Raises HTTPException 422."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        # Each alternative of a union has its own error: the first of those that go deepest says most. A field with a
        # wrong name is also a missing one.
        errors = error.errors()
        deepest = max(errors, key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
        if deepest["type"] == "json_invalid":
            reason = deepest["ctx"]["error"]
            what = "nested too deeply" if reason.startswith("recursion limit") else "not valid JSON"
            raise HTTPException(422, f"the body is {what}: {reason}") from None
        parts = [part for part in deepest["loc"] if part not in ALTERNATIVES]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
        if problem := {"extra_forbidden": "unknown", "missing": "missing"}.get(deepest["type"]):
            known = ", ".join((shape if len(parts) == 1 else Chunk).model_fields)  # the one shape inside another
            raise HTTPException(422, f"field '{name}' is {problem}: the fields are {known}") from None
        where = f"field '{name}'" if name else "the body"
        raise HTTPException(422, f"{where}{_reason(deepest, errors)}") from None


def _reason(error: ErrorDetails, errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with a field, after its name."""
    *outer, last = error["loc"] or [""]
    if last in ALTERNATIVES:
        names = [str(e["loc"][-1]) for e in errors if [*e["loc"][:-1]] == outer]
        return f" must be {' or '.join(ALTERNATIVES[name] for name in names)}"
    kind, _, problem = error["type"].partition("_")
    if problem in ("type", "parsing", "from_float"):
        return f" must be {EXPECTED[kind]}"
    for start in ("Input should ", "String should "):
        if error["msg"].startswith(start):
            return f" must {error['msg'].removeprefix(start)}"
    return f": {error['msg'].removeprefix('Value error, ')}"


def check_content(headers: Mapping[str, str]) -> None:
    """Raises HTTPException 415 unless the body is announced as JSON in UTF-8, as it is."""
    encoding, header = headers.get("content-encoding", "identity"), headers.get("content-type")
    if encoding.lower() != "identity":
        raise HTTPException(415, f"Content-Encoding {encoding!r} is not read: send the body uncompressed")
    if header is None:
        raise HTTPException(415, "the header Content-Type is missing: send Content-Type: application/json")
    content = Message()
    content["Content-Type"] = header
    if content.get_content_type() != "application/json" or content.get_content_charset("utf-8") != "utf-8":
        raise HTTPException(415, f"Content-Type {header!r} is not read: send application/json in UTF-8")


def check_length(name: str, values: Sequence[Any], other: str, others: Sequence[Any]) -> None:
    """Raises HTTPException 422 where the two lists do not belong together."""
    if len(values) != len(others):
        raise HTTPException(422, f"field '{name}' has {len(values)} entries, but '{other}' has {len(others)}")


def _strip(query: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The query from its prompt on, without padding at its ends; one pad token stays where it is also bos or eos."""
    pad, text = tokenizer.pad_token, query
    if not pad:
        return query
    while text.startswith(pad) and not (prompt and text.startswith(prompt)):
        text = text.removeprefix(pad)
    if pad == tokenizer.bos_token and text != query and not (prompt and text.startswith(prompt)):
        text = pad + text
    kept = text
    while text.endswith(pad):
        text = text.removesuffix(pad)
    return text + pad if pad == tokenizer.eos_token and text != kept else text

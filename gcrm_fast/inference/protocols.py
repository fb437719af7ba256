"""The shapes of requests, read strictly: a body that does not fit is answered 422 with the field and the reason."""

from collections.abc import Mapping, Sequence
from email.message import Message
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from gcrm_fast.inference.batcher import Text

UNION = ("str", "list[Turn]")  # how pydantic names the alternatives of a text in the location of an error
Shape = TypeVar("Shape", bound=BaseModel)


class Turn(BaseModel):
    """A message of a conversation; chat templates may read other fields of it."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str


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
    """``cuts`` marks completions that a length limit cut; ``goal`` names one of the model's goal states."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str | list[Turn]]
    completions: list[str | list[Turn]]
    cuts: list[StrictBool] | None = None
    goal: Annotated[str | None, Field(min_length=1)] = None

    def texts(self) -> tuple[list[Text], list[Text]]:
        """Prompts and completions, as text or messages."""
        check_length("prompts", self.prompts, "completions", self.completions)
        if self.cuts is not None:
            check_length("cuts", self.cuts, "completions", self.completions)
        return _plain(self.prompts), _plain(self.completions)


class VllmRequest(BaseModel):
    """vLLM's /classify and /pooling: whole texts, or one conversation with its answer.

    Fields that would change the answer are refused; an activation does not (reward models have none).
    """

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    input: str | list[str] | None = None
    messages: list[Turn] | None = None
    task: Literal["classify"] | None = None
    encoding_format: Literal["float"] = "float"
    add_special_tokens: Literal[True] = True
    use_activation: bool | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int = 0

    def texts(self) -> tuple[list[Text], list[Text]]:
        """Prompts and completions: texts have an empty prompt, messages end with the completion."""
        if (self.input is None) == (self.messages is None):
            raise HTTPException(422, "give one of the fields 'input' and 'messages'")
        if self.messages is not None:
            turns = [turn.model_dump() for turn in self.messages]
            return [turns[:-1]], [turns[-1:]]
        texts: list[Text] = [self.input] if isinstance(self.input, str) else list(self.input or [])
        return [""] * len(texts), texts


def parse(shape: type[Shape], body: bytes | bytearray) -> Shape:
    """The body, JSON, as ``shape``. Raises HTTPException 422."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        # Each alternative of a union has its own error: the first of those that go deepest says most.
        deepest = max(error.errors(), key=lambda e: len(e["loc"]))
        if deepest["type"] == "json_invalid":
            reason = deepest["ctx"]["error"]
            what = "nested too deeply" if reason.startswith("recursion limit") else "not valid JSON"
            raise HTTPException(422, f"the body is {what}: {reason}") from None
        parts = [part for part in deepest["loc"] if part not in UNION]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
        where = f"field '{name}'" if name else "the body"
        raise HTTPException(422, f"{where}: {deepest['msg']}") from None


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


def _plain(texts: Sequence[str | list[Turn]]) -> list[Text]:
    return [text if isinstance(text, str) else [turn.model_dump() for turn in text] for text in texts]


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

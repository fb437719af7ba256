"""The shapes of requests, read strictly: a body that does not fit is answered 422 with the field and the reason."""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.exceptions import HTTPException

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

    def texts(self, pad: str | None) -> tuple[list[str], list[str]]:
        """Prompts and completions, without the padding that OpenRLHF may have left around the query.

        Where the prompt ends does not change the reward.
        """
        prompts = self.prompts or [""] * len(self.query)
        check_length("prompts", prompts, "query", self.query)
        queries = [_strip(query, pad) if pad else query for query in self.query]
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


def parse(shape: type[Shape], body: bytes | bytearray) -> Shape:
    """The body, JSON, as ``shape``. Raises HTTPException 422."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        # Each alternative of a union has its own error: the first of those that go deepest says most.
        deepest = max(error.errors(), key=lambda e: len(e["loc"]))
        if deepest["type"] == "json_invalid":
            raise HTTPException(422, f"the body is not valid JSON: {deepest['ctx']['error']}") from None
        parts = [part for part in deepest["loc"] if part not in UNION]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
        where = f"field '{name}'" if name else "the body"
        raise HTTPException(422, f"{where}: {deepest['msg']}") from None


def check_length(name: str, values: Sequence[Any], other: str, others: Sequence[Any]) -> None:
    """Raises HTTPException 422 where the two lists do not belong together."""
    if len(values) != len(others):
        raise HTTPException(422, f"field '{name}' has {len(values)} entries, but '{other}' has {len(others)}")


def _plain(texts: Sequence[str | list[Turn]]) -> list[Text]:
    return [text if isinstance(text, str) else [turn.model_dump() for turn in text] for text in texts]


def _strip(text: str, pad: str) -> str:
    while text.startswith(pad):
        text = text.removeprefix(pad)
    while text.endswith(pad):
        text = text.removesuffix(pad)
    return text

"""How a model reads text, and where its rewards are read: what its folder says, or what its config.json implies."""

from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from gcrm_fast.checkpoints.adapters import find_adapter, tokenizer_folder
from gcrm_fast.checkpoints.config_json import read_json
from gcrm_fast.checkpoints.locating import ADAPTER, HEAD_FILE
from gcrm_fast.data.chat import Form, trained_on
from gcrm_fast.data.ends import Choice, End, Kind
from gcrm_fast.data.special_tokens import Reading
from gcrm_fast.data.tokenization import load_tokenizer

Q_VALUES = "q_values"  # of gcrm.json
# gcrm.json's and a goal file's 'end_policy'
POLICIES: dict[Kind, str] = {
    "eos": "completion ends with the tokenizer's eos token, which is scored",
    "transformers": "last token that is not pad_token_id is scored, after an eos that plain text is given",
    "as-is": "last token that is not pad_token_id is scored, nothing is appended",
}
WHERE: dict[Kind, str] = {
    "eos": "at an end token, appended where there is none",
    "transformers": "as transformers reads them, at the last token (plain text is given eos)",
    "as-is": "at the last token of the text as it is given",
}


def where_read(folder: Path, choice: Choice) -> tuple[End, str]:
    """(end, a line that says where rewards are read and why, or "" for a model of this project as it was trained).

    Raises:
        UserError: config.json or gcrm.json cannot be read; see find_adapter.
    """
    adapter = find_adapter(folder)
    raw = read_json((adapter.base if adapter else folder) / "config.json", "name the folder of a Hugging Face model")
    classifier = "ForSequenceClassification" in str(raw.get("architectures"))
    pad, eos = raw.get("pad_token_id"), raw.get("eos_token_id")
    if adapter and adapter.classifies:  # whose trainer took the tokenizer's pad token
        classifier, pad = True, load_tokenizer(tokenizer_folder(folder)).pad_token_id
    pad = pad if classifier and isinstance(pad, int) else None
    before_eos = pad is not None and pad in (eos if isinstance(eos, list) else [eos])
    kind: Kind
    if choice != "auto":
        kind, why = choice, f"--end {choice}"
    elif (folder / HEAD_FILE).exists():
        policy = stated(folder).get("end_policy")
        kind = next((kind for kind in get_args(Kind) if POLICIES[kind] == policy), "eos")
        if kind == "eos":
            return End(), ""
        why = f"{HEAD_FILE} says so"
    else:
        kind = "transformers" if classifier else "eos"
        source = ADAPTER if adapter and adapter.classifies else "config.json"
        why = f"there is no {HEAD_FILE}, and {source} names {'a' if classifier else 'no'} sequence classifier"
    where = WHERE[kind]
    if kind != "eos" and before_eos:
        where, why = f"{where}, which is the one before eos", f"{why} with pad_token_id = eos_token_id"
    return End(kind, None if kind == "eos" else pad), f"{folder}: rewards are read {where}: {why} (see --end)"


def stated(folder: Path) -> dict[str, Any]:
    """What gcrm.json says; empty where there is none. Raises UserError where it cannot be read."""
    return read_json(folder / HEAD_FILE, "save the model again") if (folder / HEAD_FILE).exists() else {}


def q_verdict_of(folder: Path) -> str:
    """Whether the model's Q-values can be trusted, as its training run found; "" where gcrm.json does not say."""
    return str(stated(folder).get(Q_VALUES, ""))


def read_as_trained(
    tokenizer: PreTrainedTokenizerBase, folder: Path, choice: Literal["auto"] | Reading = "auto"
) -> None:
    """Makes the tokenizer read special tokens in prompts and completions as chosen; ``auto`` is what gcrm.json says, or
    else what the tokenizer does. Prompts in another form than those of the training data will be warned of. Raises
    UserError for a gcrm.json that cannot be read."""
    saved = stated(folder)
    chosen = saved.get("special_tokens") if choice == "auto" else choice
    if chosen is not None:
        tokenizer.split_special_tokens = chosen == "text"
    prompts = saved.get("prompts")
    trained_on(tokenizer, [form for form in get_args(Form) if isinstance(prompts, list) and form in prompts])

"""What the options of a command name on the disk, checked before the imports that take seconds."""

from typing import Any

from gcrm_fast.checkpoints.locating import MODEL_FILES, TOKENIZER_FILES, locate
from gcrm_fast.commands.options import InspectOptions, OutputFile
from gcrm_fast.common.command_line import name_of
from gcrm_fast.common.files import output_file
from gcrm_fast.common.options import Options, kinds_of
from gcrm_fast.data.sources import STDIN, check_present
from gcrm_fast.evaluation.results import check_folder
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.option_checks import ARITHMETIC
from gcrm_fast.training.output_folder import check_output

RECORDS = ("data", "on_policy", "eval_data", "reference", "merge", "standardize")
MODELS = ("model", "ensemble", "policy", "reward", "tokenizer")


def check_paths(options: Options) -> None:
    """Raises UserError for records or models that do not exist, and for an output that cannot be written. What is in
    them the command checks."""
    given, kinds = vars(options), kinds_of(type(options))
    records = [name for field in RECORDS for name in _listed(given.get(field)) if name not in (STDIN, ARITHMETIC)]
    for name in records:
        check_present(name)
    for field in () if isinstance(options, InspectOptions) else MODELS:  # a file of gcrm generate needs no model there
        for name in filter(None, _listed(given.get(field))):
            locate(name, name_of(field, kinds[field]), TOKENIZER_FILES if field == "tokenizer" else MODEL_FILES)
    if isinstance(options, TrainConfig):
        check_output(options)
    elif "overwrite" in given:
        check_folder(given["output"], given["overwrite"])
    elif kinds.get("output") == OutputFile and given["output"] != STDIN:
        output_file(given["output"], records)


def _listed(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)

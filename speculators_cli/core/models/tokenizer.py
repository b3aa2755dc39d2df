"""Load a model's tokenizer, with one clear error if it cannot be loaded."""

import re
from typing import Any

from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.models.repo_files import RepoFiles
from speculators_cli.core.reading import first_line, read_json_object, refusing

CONFIG_NAME = "tokenizer_config.json"
# Those of a folder are checked here; those of the hub were checked on download.
JSON_NAMES = ("tokenizer.json", CONFIG_NAME, "special_tokens_map.json", "added_tokens.json")
FOUND = re.compile(r"tokenizer|tokenization|vocab|merges|.*\.tiktoken$")


def load_tokenizer(files: RepoFiles, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a model with transformers.

    Raises:
        SpeculatorsError: There is none, or it cannot be read; the class is `files.error`.
        MachineError: The download fails.
    """
    # It takes seconds to import, and most training runs read no text.
    from transformers import AutoTokenizer
    from transformers.utils import logging

    files.find(CONFIG_NAME)  # Raises for an invalid name or an unreachable hub.
    if files.is_local:
        _check_local(files)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(
            files.name_or_path, trust_remote_code=trust_remote_code
        )
    # The tokenizers library raises plain `Exception`, and custom code anything.
    except Exception as error:
        raise _explain(files, error) from error
    finally:
        logging.set_verbosity(level)


def _check_local(files: RepoFiles) -> None:
    if not any(FOUND.match(file.name) for file in files.folder.iterdir()):
        raise files.error(
            f"`{files.name_or_path}` has no tokenizer",
            hint="Pass a folder or hub id with `tokenizer.json`",
        )
    for name in JSON_NAMES:
        file = files.find(name)
        if file is not None:
            with refusing(files.error):
                read_json_object(file)


def _explain(files: RepoFiles, error: Exception) -> SpeculatorsError:
    reason = first_line(error)
    package = re.search(r"pip install ['`\"]?([A-Za-z][\w.\-]*)", str(error))
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        reason = "it requires custom code"
        hint = "Pass `--trust-remote-code` if you trust the code"
    elif package is not None:
        hint = f"Run `pip install {package[1]}`"
    else:
        hint = "Run `pip install -U tokenizers transformers`, or download the tokenizer again"
    return files.error(
        f"The tokenizer of `{files.name_or_path}` cannot be read: {reason}", hint=hint
    )

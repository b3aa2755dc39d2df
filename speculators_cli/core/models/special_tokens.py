"""Special tokens of a verifier, which a draft vocabulary must include, however rare they are."""

from contextlib import suppress

from speculators_cli.core.errors import MachineError, SettingsError, SpeculatorsError
from speculators_cli.core.models.repo_files import CONFIG_NAME, RepoFiles
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_shape import open_family

GENERATION_CONFIG_NAME = "generation_config.json"


def find_special_ids(
    files: RepoFiles, *, trust_remote_code: bool = False
) -> tuple[frozenset[int], SpeculatorsError | None]:
    """Find the end tokens, and the control tokens in the chat template.

    Returns:
        Their ids; the error if the tokenizer cannot be read, then from the configs only.

    Raises:
        SettingsError: A config cannot be read.
    """
    ids = read_end_ids(files, trust_remote_code=trust_remote_code)
    try:
        tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    except SpeculatorsError as error:
        return frozenset(ids), error
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.items()
    control = {token_id for token_id, token in added if token.content in template}
    return frozenset(ids | control | _as_set(tokenizer.eos_token_id, "the tokenizer")), None


def read_end_ids(files: RepoFiles, *, trust_remote_code: bool) -> set[int]:
    """Return the end tokens in config.json and the generation config.

    Raises:
        SettingsError: A config cannot be read.
    """
    # The class of a config may be strict, or not exist in transformers.
    family = open_family(files, trust_remote_code=trust_remote_code)
    ids = _as_set(family.value("eos_token_id"), CONFIG_NAME)
    with suppress(MachineError):  # not every verifier has one, and it may not be available offline
        if files.find(GENERATION_CONFIG_NAME) is not None:
            generation = files.read_json(GENERATION_CONFIG_NAME)
            ids |= _as_set(generation.get("eos_token_id"), GENERATION_CONFIG_NAME)
    return ids


def _as_set(ids: object, where: str) -> set[int]:
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise SettingsError(
            f"`eos_token_id` in `{where}` of the verifier is `{ids}`, expected whole numbers",
            hint="Correct `eos_token_id`, or download the verifier again",
        )
    return set(found)

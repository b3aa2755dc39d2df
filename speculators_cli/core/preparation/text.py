"""The text of one sample, its supervised tokens marked."""

from itertools import groupby

from transformers import AutoTokenizer

from speculators_cli.core.data.dataset import find_files, is_sample_name
from speculators_cli.core.data.formats.detect import detect
from speculators_cli.core.data.sample import BadSampleError
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.settings.inspect_data import InspectSettings


def read_text(settings: InspectSettings) -> list[tuple[str, bool]]:
    """Runs of text of a sample, and whether each is supervised.

    Raises:
        SettingsError: There is no such sample, or the verifier has no tokenizer.
        DataError: The file is not a sample.
    """
    found = find_files(settings.data_path)
    files = [file for _, file in found if is_sample_name(file.name)]
    index = settings.show
    assert index is not None, "asked only with `--show`"
    if index >= len(files):
        raise SettingsError(
            f"`--show`: there is no sample {index:,}, `{settings.data_path}` has {len(files):,}",
            hint="Count from 0, in the order of the files' names",
        )
    name = settings.verifier_name_or_path
    if name is None:
        raise SettingsError(
            "`--show` needs the verifier's tokenizer", hint="Pass `--verifier-name-or-path`"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError):
        raise SettingsError(
            f"`{name}` has no tokenizer that can be read", hint="Name a folder or hub id with one"
        ) from None
    try:
        _, tokens = detect(files[index])
    except BadSampleError as error:
        raise DataError(f"`{files[index]}` {error.reason}", hint="Name another sample") from None
    pairs = zip(tokens.input_ids.tolist(), tokens.loss_mask.tolist(), strict=True)
    return [
        (str(tokenizer.decode([token_id for token_id, _ in run])), is_supervised)
        for is_supervised, run in groupby(pairs, key=lambda pair: pair[1])
    ]

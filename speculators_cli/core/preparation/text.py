"""The text of one sample, with its supervised tokens marked."""

from speculators_cli.core.data.folder import find_files, hint_of_no_samples, is_sample_name
from speculators_cli.core.data.formats.detect import detect
from speculators_cli.core.data.sample import BadSampleError, reason_of
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.models.marked_text import mark_supervised
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.settings.inspect_data import InspectSettings


def read_text(settings: InspectSettings) -> list[tuple[str, bool]]:
    """Return the text of a sample as spans, and whether each is supervised.

    Raises:
        SettingsError: The sample does not exist, or the verifier's tokenizer cannot be read.
        DataError: The file is not a sample, or does not match this tokenizer.
        MachineError: The hub is unreachable.
    """
    found = list(find_files(settings.data_path))
    files = [file for _, file in found if is_sample_name(file.name)]
    index = settings.show
    assert index is not None, "called only with `--show`"
    if not files:
        raise DataError(
            f"`{settings.data_path}` holds no samples",
            hint=hint_of_no_samples(found),
        )
    if index >= len(files):
        raise SettingsError(
            f"`--show`: there is no sample {index:,}, `{settings.data_path}` has {len(files):,}",
            hint=f"Pass a number from 0 to {len(files) - 1:,}, in the order of the files' names",
        )
    name = settings.verifier_name_or_path
    if name is None:
        raise SettingsError(
            "`--show` needs the verifier's tokenizer", hint="Pass `--verifier-name-or-path`"
        )
    tokenizer = load_tokenizer(VerifierFiles(name), trust_remote_code=settings.trust_remote_code)
    file = files[index]
    try:
        _, tokens = detect(file)
    except (BadSampleError, OSError) as error:
        raise DataError(
            f"`{file}` {reason_of(error)}", hint="Pass the number of another sample"
        ) from None
    try:
        return mark_supervised(tokenizer, tokens.input_ids.tolist(), tokens.loss_mask.tolist())
    except (LookupError, ArithmeticError, TypeError, ValueError) as error:
        raise DataError(
            f"`{file}` has token ids that the tokenizer of `{name}` lacks: {error}",
            hint="Pass the verifier that the samples were captured from",
        ) from None

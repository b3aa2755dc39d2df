"""Read a file whose format is not known."""

from pathlib import Path

from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.formats.format import Format
from speculators_cli.core.data.sample import (
    BadSampleError,
    ChangedSampleError,
    Sample,
    SampleTokens,
)


def is_named_as(name: str, form: Format) -> bool:
    """Whether a file of this name can be a sample of a format."""
    return name.startswith(form.prefix) and name.endswith(form.suffixes)


def detect(file: Path) -> tuple[str, SampleTokens]:
    """The format of a sample, and its ids and mask.

    Raises:
        BadSampleError: It is a sample of no format.
        OSError: It cannot be opened.
    """
    if is_named_as(file.name, FORMATS["speculators"]):
        return "speculators", FORMATS["speculators"].read_tokens(file)
    try:
        return "v1", FORMATS["v1"].read_tokens(file)
    except BadSampleError as error:
        if error.other_format is None:
            raise
        return error.other_format, FORMATS[error.other_format].read_tokens(file)


def read_again(file: Path, data_format: str) -> Sample:
    """Read a file that was found to be a sample of a format before.

    Raises:
        ChangedSampleError: It is none any more, or cannot be opened.
    """
    try:
        return FORMATS[data_format].read_sample(file)
    except BadSampleError as error:
        raise ChangedSampleError(file, error.reason) from None
    except OSError as error:
        raise ChangedSampleError(file, error.strerror or str(error)) from None

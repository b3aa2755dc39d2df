"""Read a `.pt` file whose format version is not known."""

from pathlib import Path

from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.sample import BadSampleError, SampleTokens


def detect(file: Path) -> tuple[int, SampleTokens]:
    """The version of a sample, and its ids and mask.

    Raises:
        BadSampleError: It is a sample of no version.
        OSError: It cannot be opened.
    """
    try:
        return 1, FORMATS[1].read_tokens(file)
    except BadSampleError as error:
        if error.other_version is None:
            raise
        return error.other_version, FORMATS[error.other_version].read_tokens(file)

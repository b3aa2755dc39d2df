"""Detect the format of a file."""

from pathlib import Path

from speculators_cli.core.data.formats import FORMATS, v1
from speculators_cli.core.data.formats.format import SampleFormat
from speculators_cli.core.data.sample import (
    BadSampleError,
    ChangedSampleError,
    Sample,
    SampleTokens,
    refusing_sample,
)
from speculators_cli.core.torch_file.archive import Archive


def detect(file: Path) -> tuple[str, SampleTokens]:
    """Return the format of a sample, and its ids and mask.

    Raises:
        BadSampleError: It is not a sample of any format.
        OSError: It cannot be opened.
    """
    for form in FORMATS.values():
        if form.has_own_names and form.is_named(file.name):
            return form.name, form.read_tokens(file)
    with refusing_sample(), Archive(file) as archive:
        try:
            return v1.FORMAT.name, v1.FORMAT.read_tokens_in(archive)
        except BadSampleError as error:
            if error.other_format is None:
                raise
            form = FORMATS[error.other_format]
        assert isinstance(form, SampleFormat), "others are recognised by their file names"
        return form.name, form.read_tokens_in(archive)


def read_again(file: Path, data_format: str) -> Sample:
    """Read a file that was detected as a sample of a format before.

    Raises:
        ChangedSampleError: It has changed, or cannot be opened.
    """
    try:
        return FORMATS[data_format].read_sample(file)
    except BadSampleError as error:
        raise ChangedSampleError(file, error.reason) from None
    except OSError as error:
        raise ChangedSampleError(file, error.strerror or str(error)) from None


def verify(file: Path) -> None:
    """Verify the checksums of a file with the name of a sample.

    Raises:
        BadSampleError: A checksum does not match, or the file is damaged.
        OSError: It cannot be opened.
    """
    next(form for form in FORMATS.values() if form.is_named(file.name)).verify(file)


def describe_names() -> str:
    """Return the file name patterns of all formats, without packed files."""
    forms = sorted(FORMATS.values(), key=lambda form: (form.version is None, form.name))
    suffixes = [(form.prefix, x) for form in forms for x in form.suffixes if x.count(".") == 1]
    names = [f"`{prefix}*{suffix}`" if prefix else f"`{suffix}`" for prefix, suffix in suffixes]
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} or {last}"

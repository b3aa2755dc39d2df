"""Settings of online capture."""

import pytest
from pydantic import ValidationError

from speculators_cli.settings.capture import CaptureSettings


@pytest.mark.parametrize(
    ("text", "size"),
    [("2TB", 2 * 10**12), ("1.5 gb", 15 * 10**8), ("64MiB", 2**26), ("100", 100), (7, 7)],
)
def test_a_size_has_a_unit(text: object, size: int) -> None:
    settings = CaptureSettings.model_validate({"cache_dir": "c", "cache_size": text})

    assert settings.cache_size == size
    assert CaptureSettings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("text", ["2 apples", "-1GB", "GB", "1e3GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="such as `500GB`"):
        CaptureSettings.model_validate({"cache_dir": "c", "cache_size": text})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"cache_size": 5}, "`--cache-size` needs `--cache-dir`"),
        ({"cache_dtype": "float8"}, "`--cache-dtype` needs `--cache-dir`"),
        ({"cache_dir": "c", "capture": "stored"}, "of no use with `--capture stored`"),
    ],
)
def test_a_cache_that_would_be_ignored_is_refused(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        CaptureSettings.model_validate(given)


def test_defaults_are_read_back() -> None:
    settings = CaptureSettings()

    assert CaptureSettings.model_validate(settings.model_dump(mode="json")) == settings

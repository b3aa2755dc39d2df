"""The measured speed of a disk leaves nothing behind, and is bounded."""

import os
import time
from pathlib import Path

import pytest

from speculators_cli.core.data import disk_speed
from speculators_cli.core.data.disk_speed import BLOCK_BYTES, measure_disk


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "MAX_BYTES", 3 * BLOCK_BYTES)


def test_rates_are_measured_in_a_folder_that_need_not_exist(tmp_path: Path) -> None:
    began_at = time.perf_counter()

    found = measure_disk(tmp_path / "not" / "yet")

    took = time.perf_counter() - began_at
    assert found is not None
    # The whole call took longer than either part.
    assert found.read_bytes_per_second > 3 * BLOCK_BYTES / took
    assert found.written_bytes_per_second > 3 * BLOCK_BYTES / took
    assert found.free_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_reads_is_said_to_be_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuse_direct(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return open_file(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_direct)

    found = measure_disk(tmp_path)

    assert found is not None
    assert not found.bypasses_cache
    assert found.read_bytes_per_second > 0


def test_the_scratch_file_is_a_small_share_of_the_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_speed, "MAX_SHARE", 1e-12)

    assert measure_disk(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_written_where_none_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)

    assert measure_disk(tmp_path) is None

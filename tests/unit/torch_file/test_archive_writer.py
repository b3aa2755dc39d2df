"""Archives written by hand: every reader takes them, and copied bytes keep their checksum."""

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_cli.core import files
from speculators_cli.core.torch_file import zip_records
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.archive_writer import ArchiveWriter, write_structure
from speculators_cli.core.torch_file.errors import TorchFileError
from speculators_cli.core.torch_file.structure import read_structure
from speculators_cli.core.torch_file.tensor_spec import TensorSpec


def write(file: Path, *tensors: torch.Tensor) -> list[TensorSpec]:
    """Tensors as a list, by our writer, in parts of some rows."""
    with file.open("wb", buffering=0) as stream:
        writer = ArchiveWriter(stream)
        specs = [
            writer.add(
                (rows.contiguous().view(torch.uint8).flatten().numpy().data for rows in x.split(2)),
                str(x.dtype).removeprefix("torch."),
                x.shape,
            )
            for x in tensors
        ]
        writer.finish(list(specs))
    return specs


def copy(source: Path, target: Path) -> None:
    """Every tensor of a list, by our writer."""
    with Archive(source) as archive, target.open("wb", buffering=0) as stream:
        writer = ArchiveWriter(stream)
        assert isinstance(archive.content, list)
        writer.finish([writer.copy(archive, spec) for spec in archive.content])


def records(file: Path) -> dict[str, zip_records.Record]:
    with file.open("rb") as stream:
        return zip_records.read_directory(stream.fileno(), file.stat().st_size)


def data_starts(file: Path) -> list[int]:
    with file.open("rb") as stream:
        size = file.stat().st_size
        return [
            zip_records.find_start(stream.fileno(), record, size)
            for name, record in records(file).items()
            if "/data/" in name
        ]


TENSORS = (
    torch.arange(15, dtype=torch.float32).reshape(5, 3),
    torch.arange(7) > 3,
    torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    torch.zeros(0, 6),
    torch.arange(9),
)


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_written(tmp_path: Path, mmap: bool) -> None:
    file = tmp_path / "a.pt"
    write(file, *TENSORS)

    read = torch.load(file, weights_only=True, mmap=mmap)

    assert len(read) == len(TENSORS)
    for found, expected in zip(read, TENSORS, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)


def test_an_archive_is_a_sound_zip_with_aligned_data(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    write(file, *TENSORS)

    starts = data_starts(file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}

        assert archive.testzip() is None
    assert len(starts) == len(TENSORS)
    assert [start % 64 for start in starts] == [0] * len(TENSORS)
    # Our own reader of the directory says what Python's says.
    assert {name: (e.header_offset, e.file_size, e.CRC, True) for name, e in entries.items()} == {
        name: tuple(record) for name, record in records(file).items()
    }


def test_the_directory_of_torchs_own_files_is_read_as_python_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({str(i): x.clone() for i, x in enumerate(TENSORS * 30)}, file)

    with zipfile.ZipFile(file) as archive:
        expected = {e.filename: (e.header_offset, e.file_size, e.CRC) for e in archive.infolist()}

    assert len(expected) > 150
    assert {name: tuple(r[:3]) for name, r in records(file).items()} == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_copies_hold_the_very_bytes_and_checksums(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("copies")
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    tensors = []
    for _ in range(data.draw(st.integers(1, 4))):
        rows, columns = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
        content = data.draw(st.binary(min_size=8 * rows * columns, max_size=8 * rows * columns))
        dtype = data.draw(st.sampled_from(dtypes))
        values = torch.tensor(list(content[: rows * columns]), dtype=torch.int64) % 2
        view = values.to(dtype).reshape(rows, columns)
        # Views of a larger storage, transposed or cut, and two of one storage.
        tensors += data.draw(st.sampled_from([[view], [view.T], [view[1:], view], [view[:, ::2]]]))
    torch.save(tensors, folder / "source.pt")

    copy(folder / "source.pt", folder / "copy.pt")

    read = torch.load(folder / "copy.pt", weights_only=True)
    assert all(map(torch.equal, read, tensors))
    assert [x.stride() for x in read] == [x.stride() for x in tensors]
    with zipfile.ZipFile(folder / "copy.pt") as archive:
        assert archive.testzip() is None
    sizes = [
        sum(r.num_bytes for name, r in records(folder / f).items() if "/data/" in name)
        for f in ("source.pt", "copy.pt")
    ]
    # Each storage once, whatever the number of tensors in it.
    assert sizes[0] == sizes[1]


def plain_values() -> st.SearchStrategy[Any]:
    numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
    scalars = st.none() | st.booleans() | numbers | st.text()
    return st.recursive(
        scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=20
    )


@settings(max_examples=200, deadline=None)
@given(content=plain_values())
def test_a_structure_is_read_as_it_was_written(content: Any) -> None:
    assert read_structure(write_structure(content, {})) == content


def test_bytes_damaged_in_the_source_are_known_to_be_damaged_in_the_copy(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    write(source, *TENSORS)
    content = bytearray(source.read_bytes())
    content[data_starts(source)[2] + 5] ^= 1
    source.write_bytes(bytes(content))

    copy(source, tmp_path / "copy.pt")

    with (
        Archive(tmp_path / "copy.pt") as archive,
        pytest.raises(TorchFileError, match="flipped bytes in `archive/data/2`"),
    ):
        archive.verify()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("after", [0, 1])
def test_bytes_are_copied_where_the_kernel_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    calls: list[int] = []

    def refuse(source: int, target: int, count: int, start: int, at: int) -> int:
        calls.append(count)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return os.pwrite(target, os.pread(source, min(count, 5), start), at)

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(files, "BUFFER_BYTES", 7)
    write(tmp_path / "source.pt", *TENSORS)

    copy(tmp_path / "source.pt", tmp_path / "copy.pt")

    assert len(calls) > after
    read = torch.load(tmp_path / "copy.pt", weights_only=True)
    assert all(map(torch.equal, read, TENSORS))


def test_bytes_are_copied_by_systems_without_such_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    write(tmp_path / "source.pt", *TENSORS)

    copy(tmp_path / "source.pt", tmp_path / "copy.pt")

    assert (tmp_path / "copy.pt").read_bytes() == (tmp_path / "source.pt").read_bytes()


def test_a_full_disk_is_not_taken_for_a_kernel_that_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "source.pt", *TENSORS)
    monkeypatch.setattr(os, "copy_file_range", fail, raising=False)

    with pytest.raises(OSError, match="No space left"):
        copy(tmp_path / "source.pt", tmp_path / "copy.pt")


def test_a_source_that_shrinks_is_truncated(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    write(source, torch.zeros(1000))
    with Archive(source) as archive, (tmp_path / "copy.pt").open("wb", buffering=0) as stream:
        assert isinstance(archive.content, list)
        os.truncate(source, 2000)

        with pytest.raises(TorchFileError, match="is truncated"):
            ArchiveWriter(stream).copy(archive, archive.content[0])


@pytest.mark.parametrize("limit", [1, 40, 200, 600])
def test_sizes_beyond_the_limit_go_into_wider_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    # All-ones still stands for "see the wider field"; only what is written there is lowered.
    monkeypatch.setattr(zip_records, "LARGEST", limit)
    file = tmp_path / "a.pt"
    write(file, *TENSORS)

    read = torch.load(file, weights_only=True, mmap=True)

    assert all(map(torch.equal, read, TENSORS))
    with Archive(file) as archive, zipfile.ZipFile(file) as zipped:
        archive.verify()
        assert zipped.testzip() is None
        assert any(entry.extra for entry in zipped.infolist())


def test_an_archive_of_more_than_4_gib_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = 2**32 + 4096
    real = files.copy_range

    def leave_a_hole(source: int, start: int, target: int, at: int, count: int) -> None:
        if count < num_bytes:
            real(source, start, target, at, count)

    monkeypatch.setattr(zip_records, "copy_range", leave_a_hole)
    file = tmp_path / "large.pt"
    with file.open("wb", buffering=0) as stream:
        writer = zip_records.RecordWriter(stream)
        # The checksum is not looked at here.
        writer.copy("archive/data/0", stream.fileno(), 0, num_bytes, crc=0)
        writer.add("archive/data/1", [TENSORS[4].numpy().tobytes()])
        large = TensorSpec("0", "uint8", 0, (num_bytes,), (1,))
        small = TensorSpec("1", "int64", 0, (9,), (1,))
        pickled = write_structure([large, small], {"0": num_bytes, "1": 72})
        for name, data in (("byteorder", b"little"), ("version", b"3\n"), ("data.pkl", pickled)):
            writer.add(f"archive/{name}", [data])
        writer.finish()

    read = torch.load(file, weights_only=True, mmap=True)

    # A hole takes no room on the disk.
    assert file.stat().st_blocks * 512 < 2**20
    assert (len(read[0]), int(read[0][-1])) == (num_bytes, 0)
    assert torch.equal(read[1], TENSORS[4])
    with Archive(file) as archive:
        assert archive.content == [large, small]
        assert torch.equal(archive.read_tensor(small), TENSORS[4])
    with zipfile.ZipFile(file) as zipped:
        assert zipped.getinfo("archive/data/0").file_size == num_bytes
        assert zipped.getinfo("archive/data/1").header_offset > 2**32

"""Files from outside that are not what they should be: the reason, the fix, and no hang."""

import io
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from speculators_cli.core.errors import DataError
from speculators_cli.core.reading import (
    UnreadableError,
    open_safetensors,
    read_json,
    read_json_object,
    read_npy,
    refusing,
)

WEIGHTS = save({"a": torch.arange(12.0).view(3, 4)})
ARRAY = io.BytesIO()
np.save(ARRAY, np.arange(9))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def read_weights(file: Path) -> list[torch.Tensor]:
    with open_safetensors(file) as tensors:
        return [tensors.get_tensor(name) for name in tensors.names()]


READERS: dict[str, Callable[[Path], object]] = {
    "json": read_json_object,
    "safetensors": read_weights,
    "npy": read_npy,
}


def header(**fields: object) -> bytes:
    """A safetensors file of one tensor `a` and 48 bytes of data."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]} | fields})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(48)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("content", "reason", "hint"),
    [
        (b"", "is empty (0 bytes)", "Download it again"),
        (LFS, "is a Git LFS pointer", "Run `git lfs pull` in "),
        (b"\n<!DOCTYPE html><title>404</title>", "is a web page", "Download it again"),
        (bytes(64), "is filled with zeros", "Download it again"),
    ],
)
def test_what_stands_in_place_of_a_file_is_recognised(
    content: bytes, reason: str, hint: str, kind: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)

    with pytest.raises(UnreadableError) as caught:
        READERS[kind](file)

    assert caught.value.reason.startswith(reason)
    assert caught.value.hint.startswith(hint)
    assert f"`{file}`" in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_is_refused_without_waiting_for_it(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("gone")
    expected = {
        tmp_path / "fifo": "is a FIFO, not a file",
        tmp_path: "is a folder, not a file",
        Path("/dev/zero"): "is a device, not a file",
        tmp_path / "nothing": "does not exist",
        tmp_path / "link": "is a link to `gone`, which does not exist",
        tmp_path / "a\0b": "cannot be read: embedded null byte",
    }

    reasons = {}
    for file in expected:
        with pytest.raises(UnreadableError) as caught:
            READERS[kind](file)
        reasons[file] = caught.value.reason

    assert reasons == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1', "is truncated: its JSON ends early, in line 1, column 8"),
        (b'{"a": "x', "is truncated: its JSON ends early, in line 1, column 7"),
        (b'{"a":\n 1,,}', "is not JSON: Expecting property name enclosed in double quotes, line 2"),
        (b"[1]", "holds a list, expected an object"),
        (b"null", "holds null, expected an object"),
        (b'"x"', "holds a text, expected an object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "cannot be used: Exceeds the limit"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text, expected UTF-8"),
        (b'{"a": "\xff"}', "is not UTF-8 text (at byte 7), expected UTF-8"),
    ],
)
def test_json_that_cannot_be_read_says_why(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)

    with pytest.raises(UnreadableError) as caught:
        read_json_object(file)

    assert caught.value.reason.startswith(reason)


def test_json_may_have_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"a":\r\n1}\r\n')

    assert read_json(file) == {"a": 1}


def test_a_json_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.touch()
    os.truncate(file, 2**40)  # sparse: takes no room on the disk

    with pytest.raises(UnreadableError, match="is too large: 1,099,511,627,776 bytes"):
        read_json(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"abc", "is not a safetensors file: it has no header"),
        (WEIGHTS[:20], "is truncated: it has 20 bytes, fewer than its header"),
        (WEIGHTS[:-5], f"is truncated or damaged: its header does not match {len(WEIGHTS) - 5}"),
        (struct.pack("<Q", 2**60) + WEIGHTS[8:], "is not a safetensors file: it has no header"),
        (header(dtype="XX"), "is damaged: invalid JSON in header: unknown variant `XX`"),
        (header(dtype="BOOL"), "is damaged: invalid shape, data type, or offset for tensor"),
        (header(shape=[30, 4]), "is damaged: invalid shape, data type, or offset for tensor"),
    ],
)
def test_weights_that_cannot_be_read_say_why(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)

    with pytest.raises(UnreadableError) as caught:
        read_weights(file)

    assert caught.value.reason.startswith(reason)


def test_a_tensor_of_a_type_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    text = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [64], "data_offsets": [0, 48]}})
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(48))

    with pytest.raises(UnreadableError, match="has a tensor `a` that cannot be read"):
        read_weights(file)


def test_a_tensor_that_a_file_lacks_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(WEIGHTS)

    with open_safetensors(file) as tensors, pytest.raises(UnreadableError) as caught:
        tensors.get_slice("b")

    assert str(caught.value) == f"`{file}` has no tensor `b`"


def test_whole_weights_are_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(WEIGHTS)

    with open_safetensors(file) as tensors:
        names, shape = tensors.names(), tensors.get_slice("a").get_shape()
        tensor = tensors.get_tensor("a")

    assert (names, shape) == (["a"], [3, 4])
    assert torch.equal(tensor, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("'descr': '<i8', 'fortran_order': False, 'shape': (10**9,)", "is not an array"),
        ("'descr': '<i8', 'fortran_order': False, 'shape': (1000000000,)", "is truncated"),
        ("'descr': '<i8', 'fortran_order': False, 'shape': (-1,)", "is not an array"),
        ("'descr': 'O', 'fortran_order': False, 'shape': (1,)", "is not an array"),
    ],
)
def test_an_array_that_claims_more_than_its_file_holds_is_refused(
    fields: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "d2t.npy"
    text = f"{{{fields}}}".encode()
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(8))

    with pytest.raises(UnreadableError) as caught:
        read_npy(file)

    assert caught.value.reason.startswith(reason)


def test_a_damaged_array_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    file = tmp_path / "d2t.npy"
    choose = random.Random(0)  # noqa: S311 - of no secret
    num_refused = 0

    for _ in range(300):
        content = bytearray(ARRAY.getvalue())
        for _ in range(choose.choice([1, 2, 4])):
            content[choose.randrange(len(content))] = choose.randrange(256)
        file.write_bytes(content[: choose.choice([len(content), choose.randrange(len(content))])])
        try:
            read_npy(file)
        except UnreadableError:
            num_refused += 1

    assert 200 < num_refused < 300


def test_an_unreadable_file_becomes_the_error_of_its_role(tmp_path: Path) -> None:
    file = tmp_path / "data_config.json"
    file.write_text("{")

    with pytest.raises(DataError) as caught, refusing(DataError, flag="--data-path"):
        read_json(file, fix="Repair the file, or remove it")

    assert caught.value.message.startswith(f"`--data-path`: `{file}` is truncated")
    assert caught.value.hint == "Repair the file, or remove it"


def test_weights_are_read_whatever_bytes_their_name_has(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    file.write_bytes(WEIGHTS)

    assert torch.equal(read_weights(file)[0], torch.arange(12.0).view(3, 4))

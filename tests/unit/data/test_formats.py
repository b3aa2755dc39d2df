"""v0 and v1 samples: what is read, what is refused, and that nothing in a file ever runs."""

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_cli.core.data.batch import collate
from speculators_cli.core.data.formats import FORMATS, v1
from speculators_cli.core.data.sample import BadSampleError, Sample
from speculators_cli.core.torch_file.archive_writer import ArchiveWriter
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

S, HIDDEN, AUX = 7, 6, 3


def v1_content(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    content: dict[str, Any] = {
        "input_ids": torch.arange(S),
        "loss_mask": (torch.arange(S) > 2).long(),
        "hidden_states": list(torch.randn(AUX + 1, S, HIDDEN, generator=generator).bfloat16()),
    }
    content |= changes
    return {key: value for key, value in content.items() if value is not None}


def v0_content(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    content: dict[str, Any] = {
        "input_ids": torch.arange(S),
        "loss_mask": (torch.arange(S) > 2).long(),
        "hidden_state": torch.randn(S, AUX * HIDDEN, generator=generator).bfloat16(),
        "target": torch.randn(S, HIDDEN, generator=generator).bfloat16(),
    }
    content |= changes
    return {key: value for key, value in content.items() if value is not None}


def specforge_content(**changes: object) -> dict[str, Any]:
    v0 = v0_content()
    content = {
        "input_ids": v0["input_ids"],
        "loss_mask": v0["loss_mask"],
        "aux_hidden_state": v0["hidden_state"][None],
        "hidden_state": v0["target"][None],
    }
    content |= changes
    return {key: value for key, value in content.items() if value is not None}


def saved(folder: Path, content: object) -> Path:
    file = folder / "sample.pt"
    torch.save(content, file)
    return file


def refused(file: Path, version: str = "v1") -> str:
    """Why a file is refused; header and sample must agree."""
    with pytest.raises(BadSampleError) as header_error:
        FORMATS[version].read_tokens(file)
    with pytest.raises(BadSampleError) as sample_error:
        FORMATS[version].read_sample(file)
    assert header_error.value.reason == sample_error.value.reason
    return header_error.value.reason


def loaded(sample: Sample) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Aux and last hidden states, read into memory."""
    return [states[:] for states in sample.aux_hidden_states], sample.last_hidden_states[:]


def equal(first: Sample, second: Sample) -> bool:
    return (
        torch.equal(first.input_ids, second.input_ids)
        and torch.equal(first.loss_mask, second.loss_mask)
        and len(first.aux_hidden_states) == len(second.aux_hidden_states)
        and all(map(torch.equal, loaded(first)[0], loaded(second)[0]))
        and torch.equal(loaded(first)[1], loaded(second)[1])
        and first.is_normed == second.is_normed
    )


def test_v1_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    content = v1_content()
    file = saved(tmp_path, content)

    sample = FORMATS["v1"].read_sample(file)
    header = FORMATS["v1"].read_tokens(file).header()

    assert torch.equal(sample.input_ids, content["input_ids"])
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * 4
    for read, written in zip(loaded(sample)[0], content["hidden_states"], strict=False):
        assert torch.equal(read, written)
    assert len(sample.aux_hidden_states) == AUX
    assert torch.equal(sample.last_hidden_states[:], content["hidden_states"][-1])
    # Trap: normed twice, or never; v1 is before the norm.
    assert not sample.is_normed
    assert (header.num_tokens, header.num_supervised_tokens) == (S, 4)
    assert (header.hidden_size, header.num_aux_layers) == (HIDDEN, AUX)
    assert (header.dtype, header.max_token_id, header.is_normed) == ("bfloat16", S - 1, False)


def test_v0_is_cut_into_layers_and_is_normed(tmp_path: Path) -> None:
    content = v0_content()

    sample = FORMATS["v0"].read_sample(saved(tmp_path, content))

    assert torch.equal(torch.cat(loaded(sample)[0], -1), content["hidden_state"])
    assert all(layer.shape == (S, HIDDEN) for layer in sample.aux_hidden_states)
    assert torch.equal(sample.last_hidden_states[:], content["target"])
    assert sample.is_normed


@pytest.mark.parametrize("flag", [True, torch.tensor(True), torch.tensor([1])])
def test_our_own_key_says_that_the_last_states_are_normed(tmp_path: Path, flag: Any) -> None:
    file = saved(tmp_path, v1_content(last_hidden_state_is_normed=flag))

    assert FORMATS["v1"].read_sample(file).is_normed
    assert FORMATS["v1"].read_tokens(file).header().is_normed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    first = FORMATS["v1"].read_sample(saved(tmp_path, v1_content()))
    first = replace(
        first,
        aux_hidden_states=tuple(layer.to(dtype) for layer in loaded(first)[0]),
        last_hidden_states=loaded(first)[1].to(dtype),
    )

    v1.write_sample(first, tmp_path / "again.pt")

    assert equal(FORMATS["v1"].read_sample(tmp_path / "again.pt"), first)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.pt", "sample.pt"]


def test_a_specforge_sample_holds_what_its_v0_twin_does(tmp_path: Path) -> None:
    # Trap: `hidden_state` are the last hidden states here, and the aux ones in v0.
    file = saved(tmp_path, specforge_content())
    sample = FORMATS["specforge"].read_sample(file)
    header = FORMATS["specforge"].read_tokens(file).header()

    assert equal(sample, FORMATS["v0"].read_sample(saved(tmp_path, v0_content())))
    assert sample.is_normed
    assert (header.num_tokens, header.num_aux_layers, header.hidden_size) == (S, AUX, HIDDEN)


def test_a_v0_sample_becomes_a_v1_sample_that_says_it_is_normed(tmp_path: Path) -> None:
    first = FORMATS["v0"].read_sample(saved(tmp_path, v0_content()))

    v1.write_sample(first, tmp_path / "again.pt")

    assert equal(FORMATS["v1"].read_sample(tmp_path / "again.pt"), first)
    # Views of a larger tensor are not saved with all of it.
    assert (tmp_path / "again.pt").stat().st_size < (tmp_path / "sample.pt").stat().st_size + 2048


def test_slices_of_a_larger_tensor_and_leading_dimensions_of_one_are_read(tmp_path: Path) -> None:
    large = torch.randn(AUX + 1, 2 * S, HIDDEN)
    content = v1_content(
        input_ids=torch.arange(100, 100 + 2 * S)[None, ::2],
        loss_mask=torch.ones(1, S, dtype=torch.bool),
        hidden_states=list(large[:, ::2]),
    )

    sample = FORMATS["v1"].read_sample(saved(tmp_path, content))

    assert sample.input_ids.tolist() == list(range(100, 114, 2))
    assert torch.equal(sample.last_hidden_states[:], large[-1, ::2])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16]
)
def test_masks_of_any_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    file = saved(tmp_path, v1_content(loss_mask=torch.tensor([0, 1, 1, 0, 1, 0, 0]).to(dtype)))

    assert FORMATS["v1"].read_sample(file).loss_mask.tolist() == [0, 1, 1, 0, 1, 0, 0]
    # The first token cannot be predicted; the rest of the mask counts.
    assert FORMATS["v1"].read_tokens(file).header().num_supervised_tokens == 3


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("has_batch", [False, True])
@pytest.mark.parametrize("name", ["v0", "v1", "specforge"])
def test_samples_of_few_tokens_keep_their_dimensions(
    tmp_path: Path, name: str, num_tokens: int, has_batch: bool
) -> None:
    # Trap: the leading 1 of one token is no batch.
    last, wide = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, AUX * HIDDEN)
    layers = [*wide.split(HIDDEN, -1), last]
    states: dict[str, dict[str, Any]] = {
        "v0": {"hidden_state": wide, "target": last},
        "v1": {"hidden_states": [layer.contiguous() for layer in layers]},
        "specforge": {"aux_hidden_state": wide, "hidden_state": last},
    }
    content = states[name] | {
        "input_ids": torch.arange(num_tokens),
        "loss_mask": torch.ones(num_tokens).long(),
    }
    if has_batch:
        content = {
            key: [x[None] for x in value] if isinstance(value, list) else value[None]
            for key, value in content.items()
        }
    file = saved(tmp_path, content)

    aux, read = loaded(FORMATS[name].read_sample(file))

    assert all(map(torch.equal, [*aux, read], layers))
    assert FORMATS[name].read_tokens(file).header().num_tokens == num_tokens


@pytest.mark.parametrize(
    ("aux", "last", "common"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float16, torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["v0", "v1", "specforge"])
def test_layers_of_one_sample_may_differ_in_type(
    tmp_path: Path, name: str, aux: torch.dtype, last: torch.dtype, common: torch.dtype
) -> None:
    v0 = v0_content()
    wide, target = v0["hidden_state"].to(aux), v0["target"].to(last)
    layers = [x.contiguous() for x in wide.split(HIDDEN, -1)]
    contents = {
        "v0": v0_content(hidden_state=wide, target=target),
        "v1": v1_content(hidden_states=[*layers, target]),
        "specforge": specforge_content(aux_hidden_state=wide, hidden_state=target),
    }
    file = saved(tmp_path, contents[name])

    sample = FORMATS[name].read_sample(file)
    batch = collate(
        [0], [sample], total_seq_len=S, num_aux_layers=AUX, hidden_size=HIDDEN, dtype=common
    )

    assert {states.dtype for states in sample.aux_hidden_states} == {aux}
    assert sample.last_hidden_states.dtype == last
    assert FORMATS[name].read_tokens(file).header().dtype == str(common).removeprefix("torch.")
    # Each value is cast once, and none is rounded.
    assert torch.equal(batch.aux_hidden_states[: S - 1].double(), wide[:-1].double())
    assert torch.equal(batch.last_hidden_states.double(), target[3:].double())


@pytest.mark.parametrize("token_id", [2**24, 2**31, 2**40, 2**63 - 1])
def test_a_token_id_beyond_any_vocabulary_is_refused(tmp_path: Path, token_id: int) -> None:
    ids = torch.arange(S)
    ids[2] = token_id

    reason = refused(saved(tmp_path, v1_content(input_ids=ids)))

    assert reason == f"has token id {token_id:,} in `input_ids`, beyond any vocabulary"


def packed(folder: Path, data: bytes) -> Path:
    file = folder / "data_0.ckpt.gz"
    file.write_bytes(data)
    return file


def test_a_packed_sample_is_the_one_that_was_packed(tmp_path: Path) -> None:
    data = _bytes_of(specforge_content())
    expected = FORMATS["specforge"].read_sample(saved(tmp_path, specforge_content()))

    for parts in ([data], [data[:3000], data[3000:]]):
        file = packed(tmp_path, b"".join(map(gzip.compress, parts)))
        assert equal(FORMATS["specforge"].read_sample(file), expected)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-9], "is a truncated gzip file"),
        (lambda data: data[:40], "is a truncated gzip file"),
        (lambda data: data[:-8] + b"\0" * 8, "is a damaged gzip file"),
        (lambda data: data[:99] + b"\xff" * 9 + data[108:], "is a damaged gzip file"),
        (lambda data: data + b"more", "is a damaged gzip file"),
        (lambda _: gzip.compress(b"no sample"), "is not a file that `torch.save` writes"),
        (lambda _: gzip.compress(bytes(2**27), 9), "unpacks to more than 67,108,864 bytes"),
    ],
    ids=["cut", "a stub", "checksum", "flipped", "more behind it", "no sample", "a bomb"],
)
def test_what_is_no_packed_sample_is_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    file = packed(tmp_path, damage(gzip.compress(_bytes_of(specforge_content()))))

    assert refused(file, version="specforge").startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_ids": None}, "has no `input_ids`; found `loss_mask`"),
        ({"loss_mask": None}, "has no `loss_mask`"),
        ({"hidden_states": None}, "has no `hidden_states`"),
        ({"hidden_states": torch.zeros(4, S, HIDDEN)}, "expected a list of layers"),
        ({"hidden_states": [torch.zeros(S, HIDDEN)]}, "expected two or more tensors"),
        ({"hidden_states": [torch.zeros(S, HIDDEN), 3]}, "1 tensors among the 2 entries"),
        ({"hidden_states": [torch.zeros(S, HIDDEN), torch.zeros(S - 1, HIDDEN)]}, "7 input ids"),
        ({"hidden_states": [torch.zeros(S, 4), torch.zeros(S, 5)]}, "has hidden size 4"),
        ({"hidden_states": [torch.zeros(S, HIDDEN).int()] * 2}, "of type int32, expected floats"),
        ({"hidden_states": [torch.zeros(S)] * 2}, "hidden states of shape [7]"),
        ({"input_ids": torch.zeros(S)}, "has `input_ids` of type float32"),
        ({"input_ids": torch.zeros(2, S).long()}, "has `input_ids` of shape [2, 7]"),
        ({"input_ids": torch.arange(S) - 1}, "negative ids"),
        ({"input_ids": [1, 2, 3]}, "has a list as `input_ids`, expected a tensor"),
        ({"loss_mask": torch.full((S,), 2)}, "values other than 0 and 1"),
        ({"loss_mask": torch.ones(S + 1).long()}, "7 input ids but a loss mask of 8"),
        ({"loss_mask": torch.ones(S).to_sparse()}, "a sparse tensor"),
        ({"last_hidden_state_is_normed": "yes"}, "has no boolean"),
        ({"last_hidden_state_is_normed": torch.ones(2)}, "has a flag of shape [2]"),
    ],
)
def test_what_is_not_a_v1_sample_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refused(saved(tmp_path, v1_content(**changes)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": None}, "has no `target`"),
        ({"hidden_state": torch.zeros(S, 17)}, "17 wide, not a multiple of the 6"),
        ({"hidden_state": torch.zeros(S, 0)}, "0 wide"),
        ({"target": torch.zeros(S)}, "of shape [7]"),
    ],
)
def test_what_is_not_a_v0_sample_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refused(saved(tmp_path, v0_content(**changes)), version="v0")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "is a list, not a dict"),
        ({3: 5, 7: 1}, "is a table of token counts"),
        ({"token_ids": torch.arange(3)}, "another tool's format"),
        ({"aux_hidden_state": torch.zeros(1, 2, 3)}, "is a specforge sample, read as"),
        (torch.zeros(3), "is a tensor, not a dict"),
        ({}, "no keys"),
    ],
)
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_foreign_content_is_named(
    tmp_path: Path, content: object, reason: str, version: str
) -> None:
    assert reason in refused(saved(tmp_path, content), version)


@pytest.mark.parametrize(
    ("content", "read_as", "found"),
    [
        (specforge_content, "v0", "specforge"),
        (specforge_content, "v1", "specforge"),
        (v0_content, "specforge", "v0"),
        (v1_content, "specforge", "v1"),
    ],
)
def test_another_tools_samples_are_recognised(
    tmp_path: Path, content: Callable[[], dict[str, Any]], read_as: str, found: str
) -> None:
    with pytest.raises(BadSampleError) as error:
        FORMATS[read_as].read_tokens(saved(tmp_path, content()))

    assert error.value.other_format == found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_state": None}, "has no `hidden_state`"),
        ({"aux_hidden_state": torch.zeros(1, S, 17)}, "17 wide, not a multiple of the 6"),
        ({"aux_hidden_state": torch.zeros(1, S + 1, 18)}, "hidden states in layer 0"),
    ],
)
def test_what_is_not_a_specforge_sample_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refused(saved(tmp_path, specforge_content(**changes)), version="specforge")


def test_the_other_version_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match="is a v0 sample, read as v1") as error:
        FORMATS["v1"].read_tokens(saved(tmp_path, v0_content()))
    assert error.value.other_format == "v0"

    with pytest.raises(BadSampleError, match="is a v1 sample, read as v0") as error:
        FORMATS["v0"].read_tokens(saved(tmp_path, v1_content()))
    assert error.value.other_format == "v1"


def _bytes_of(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _legacy(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _compressed() -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(_bytes_of(v1_content()))) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<!doctype html><p>404", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" * 9, "is not a file that `torch.save` writes"),
        (_legacy(v1_content()), "before 1.6"),
        (_bytes_of(v1_content())[:-200], "is truncated or damaged"),
        (_compressed(), "is compressed"),
    ],
)
def test_files_that_are_no_archives_are_named(tmp_path: Path, data: bytes, reason: str) -> None:
    file = tmp_path / "sample.pt"
    file.write_bytes(data)

    assert reason in refused(file)


class Marker:
    """Leaves a file behind if a pickle of it is ever run."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


class Hostile:
    """Builds the structure of an archive from parts that try to run or to take memory."""

    @staticmethod
    def call(function: Callable[..., object], *arguments: object) -> bytes:
        return pickle.dumps({"input_ids": Marker(function, *arguments)}, 2)

    @staticmethod
    def tensor(
        size: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
    ) -> bytes:
        """A pickle that claims a tensor over a storage of `size` floats."""

        def number(value: int) -> bytes:
            data = value.to_bytes(9, "little", signed=True)
            return pickle.LONG1 + bytes([len(data)]) + data

        def numbers(values: tuple[int, ...]) -> bytes:
            return pickle.MARK + b"".join(number(value) for value in values) + pickle.TUPLE

        def text(value: str) -> bytes:
            return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

        storage = b"".join(
            [
                pickle.MARK,
                text("storage"),
                b"ctorch\nFloatStorage\n",
                text("0"),
                text("cpu"),
                number(size),
                pickle.TUPLE,
                pickle.BINPERSID,
            ]
        )
        tensor = b"".join(
            [
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                pickle.MARK,
                storage,
                number(offset),
                numbers(shape),
                numbers(stride),
                pickle.NEWFALSE,
                pickle.NONE,
                pickle.TUPLE,
                pickle.REDUCE,
            ]
        )
        return b"".join(
            [b"\x80\x02", pickle.EMPTY_DICT, text("input_ids"), tensor, pickle.SETITEM, b"."]
        )


HOSTILE: dict[str, bytes] = {
    "system": Hostile.call(os.system, "touch executed"),
    "eval": Hostile.call(eval, "open('executed', 'w')"),
    "exec": Hostile.call(exec, "open('executed', 'w')"),
    "open": Hostile.call(open, "executed", "w"),
    "getattr": Hostile.call(getattr, "text", "upper"),
    "import": Hostile.call(__import__, "antigravity"),
    "bytearray": Hostile.call(bytearray, 10**12),
    "range-list": Hostile.call(list, range(3)),
    "global-alone": b"\x80\x02cposix\nsystem\n.",
    "instance": b"(S'touch executed'\nios\nsystem\n.",
    "object": b"\x80\x02cos\nsystem\n(X\x0e\x00\x00\x00touch executedt\x81.",
    "build": b"\x80\x02}}b.",
    "extension": b"\x80\x02\x82\x01.",
    "string-global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
    "torch-load": b"\x80\x02ctorch\nload\nX\x08\x00\x00\x00executed\x85R.",
    "set-state": b"\x80\x02ctorch._utils\n_rebuild_parameter_with_state\n)R.",
    "empty": b"",
    "no-stop": b"\x80\x02}",
    "pop-nothing": b"\x80\x020.",
    "unknown-memo": b"\x80\x02h\x07.",
    "huge-memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "huge-text": b"\x80\x02X\xff\xff\xff\xffabc.",
    "huge-text-8": b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.",
    "huge-bytes": b"\x80\x02B\xff\xff\xff\x7fabc.",
    "huge-long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "negative-long": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "unknown-protocol": b"\x80\xff}.",
    "text-protocol": b"(dp0\nS'input_ids'\nI1\ns.",
    "deep-lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep-tuples": b"\x80\x02)" + b"\x85" * 150_000 + b".",
    "deep-key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "many-marks": b"\x80\x02" + b"(" * 150_000 + b".",
    "too-long": b"\x80\x02}" + b"N0" * 200_000 + b".",
    "expanded": Hostile.tensor(1, (10**12,), (0,)),
    "strides": Hostile.tensor(8, (2, 2), (10**9, 1)),
    "negative-stride": Hostile.tensor(8, (2,), (-1,)),
    "negative-size": Hostile.tensor(8, (-2,), (1,)),
    "overflow": Hostile.tensor(8, (2**40, 2**40), (1, 1)),
    "past-the-end": Hostile.tensor(8, (4,), (1,), offset=6),
    "negative-offset": Hostile.tensor(8, (4,), (1,), offset=-4),
    "larger-than-its-data": Hostile.tensor(10**12, (10**12,), (1,)),
    "many-dimensions": Hostile.tensor(1, (1,) * 1000, (1,) * 1000),
    "uneven-dimensions": Hostile.tensor(8, (2, 2), (1,)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_without_running_or_filling_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sample.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sample/data.pkl", HOSTILE[name])
        archive.writestr("sample/data/0", bytes(32))
        archive.writestr("sample/byteorder", "little")

    tracemalloc.start()
    reason = refused(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert reason
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample.pt"]
    assert peak < 64 * 2**20


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_is_read_or_refused_but_never_an_error_of_ours(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(_bytes_of(v1_content()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(content)) | st.just(len(content)))
    file = tmp_path_factory.mktemp("damaged") / "sample.pt"
    file.write_bytes(content[:cut])

    with suppress(BadSampleError):
        sample = FORMATS["v1"].read_sample(file)
        assert len(sample.input_ids) == len(sample.loss_mask) == len(sample.last_hidden_states)


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    # Trap: each storage is copied whole, so that a small file would grow without end.
    content = bytearray(_bytes_of(v1_content()))
    file, at = tmp_path / "sample.pt", content.index(b"PK\1\2")
    while content[at : at + 4] == b"PK\1\2":
        sizes = struct.unpack_from("<3H", content, at + 28)
        # Each record claims half of the file.
        struct.pack_into("<2I", content, at + 20, *[len(content) // 2] * 2)
        at += 46 + sum(sizes)
    file.write_bytes(content)

    assert refused(file) == "is damaged: the records of its zip archive overlap"


def test_ids_of_a_sparse_file_do_not_fill_memory(tmp_path: Path) -> None:
    num_ids = 2**36
    file = tmp_path / "sample.pt"
    with file.open("wb") as stream:
        writer = ArchiveWriter(stream)
        states = [writer.add([bytes(4 * HIDDEN)], "float32", (1, HIDDEN)) for _ in range(2)]
        spec = TensorSpec("hole", "int64", 0, (num_ids,), (1,))
        content = {"input_ids": spec, "loss_mask": spec, "hidden_states": states}
        writer._storage_bytes["hole"] = 8 * num_ids
        at = writer._records._find_start("archive/data/hole")
        os.truncate(file, at + 8 * num_ids)
        writer._records._enter("archive/data/hole", at, 8 * num_ids, 0)
        writer.finish(content)

    with pytest.raises(BadSampleError):
        FORMATS["v1"].read_tokens(file)

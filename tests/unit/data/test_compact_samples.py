"""v1 samples in less space: float8 hidden states, and last ones at supervised tokens only."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_cli.core.data import states_buffer
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.float8 import ScaledStates, quantize_rows
from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.sample import BadSampleError, ChangedSampleError, Sample
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.progress import SilentProgress

S, HIDDEN, AUX = 11, 24, 3
SCALES, ONLY = "hidden_states_scales", "last_hidden_state_is_supervised_only"
OPTIONS: list[dict[str, Any]] = [
    {"storage_dtype": dtype, "supervised_only": only}
    for dtype in (None, "bfloat16", "float8")
    for only in (False, True)
]
MASKS: dict[str, Callable[[int], torch.Tensor]] = {
    "two turns": lambda n: torch.arange(n) % 7 > 2,
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
}


def make_sample(
    *, num_tokens: int = S, mask: str = "two turns", seed: int = 0, is_normed: bool = False
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    *aux, last = torch.randn(AUX + 1, num_tokens, HIDDEN, generator=generator).bfloat16()
    aux[1][:1] *= 3000  # massive activations of the first token
    aux[2][3:4] = 0
    ids = torch.randint(0, 37, (num_tokens,), generator=generator)
    return Sample(ids, MASKS[mask](num_tokens), tuple(aux), last, is_normed)


def held(states: torch.Tensor, sample: Sample, *, supervised_only: bool) -> torch.Tensor:
    return states[sample.loss_mask] if supervised_only else states


def layers_of(sample: Sample) -> list[torch.Tensor]:
    """All rows that exist."""
    last = sample.last_hidden_states
    rows = sample.loss_mask if isinstance(last, SupervisedRows) else slice(None)
    return [*(states[:] for states in sample.aux_hidden_states), last[rows]]


def dequantized(states: torch.Tensor) -> torch.Tensor:
    values, scales = quantize_rows(states)
    return (values.float() * scales[:, None]).bfloat16()


def batch_of(
    *samples: Sample, total_seq_len: int = 32, dtype: torch.dtype = torch.bfloat16
) -> Batch:
    return collate(
        range(len(samples)),
        samples,
        total_seq_len=total_seq_len,
        num_aux_layers=AUX,
        hidden_size=HIDDEN,
        dtype=dtype,
    )


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_written_sample_is_read_again(tmp_path: Path, options: dict[str, Any], mask: str) -> None:
    sample = make_sample(mask=mask, is_normed=mask == "all")
    is_float8 = options["storage_dtype"] == "float8"

    v1.write_sample(sample, tmp_path / "a.pt", **options)
    read, tokens = (
        v1.FORMAT.read_sample(tmp_path / "a.pt"),
        v1.FORMAT.read_tokens(tmp_path / "a.pt"),
    )

    *aux, last = (*sample.aux_hidden_states, sample.last_hidden_states[:])
    expected = [
        *(states[:] for states in aux),
        held(last, sample, supervised_only=options["supervised_only"]),
    ]
    for found, states in zip(layers_of(read), expected, strict=True):
        assert torch.equal(found, dequantized(states) if is_float8 else states)
    assert torch.equal(read.input_ids, sample.input_ids)
    assert torch.equal(read.loss_mask, sample.loss_mask)
    assert read.is_normed == tokens.is_normed == sample.is_normed
    assert read.last_hidden_states.shape == (S, HIDDEN)
    assert (tokens.hidden_size, tokens.num_aux_layers) == (HIDDEN, AUX)
    assert tokens.dtype == ("float8_e4m3fn" if is_float8 else "bfloat16")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch_reads_the_file(tmp_path: Path, options: dict[str, Any]) -> None:
    sample = make_sample()

    v1.write_sample(sample, tmp_path / "a.pt", **options)
    content = torch.load(tmp_path / "a.pt", weights_only=True)

    assert content["input_ids"].tolist() == sample.input_ids.tolist()
    num_last = int(sample.loss_mask.sum()) if options["supervised_only"] else S
    assert [len(x) for x in content["hidden_states"]] == [S] * AUX + [num_last]
    assert (ONLY in content) == options["supervised_only"]
    assert (SCALES in content) == (options["storage_dtype"] == "float8")
    for states, scales in zip(content["hidden_states"], content.get(SCALES, []), strict=False):
        assert (states.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert scales.shape == states.shape[:1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_samples_become_equal_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    sample = make_sample()
    mask = sample.loss_mask
    sparse = replace(
        sample, last_hidden_states=SupervisedRows(sample.last_hidden_states[mask], mask)
    )

    for name, given_sample in (("a", sample), ("b", make_sample()), ("c", sparse)):
        v1.write_sample(given_sample, tmp_path / name, **options)

    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    # States that exist at supervised tokens only are never expanded.
    assert (first == third) == options["supervised_only"]


@pytest.mark.parametrize("storage_dtype", [None, "float8"])
def test_quantized_layers_are_not_quantized_again(
    tmp_path: Path, storage_dtype: v1.StorageDtype | None
) -> None:
    sample = make_sample(num_tokens=150)
    mask = sample.loss_mask

    def quantized(states: torch.Tensor) -> ScaledStates:
        values, scales = quantize_rows(states)
        # Would be others, if the products were quantized.
        return ScaledStates(values, 3 * scales[:, None])

    given_sample = replace(
        sample,
        aux_hidden_states=tuple(quantized(x[:]) for x in sample.aux_hidden_states),
        last_hidden_states=SupervisedRows(quantized(sample.last_hidden_states[mask]), mask),
    )

    v1.write_sample(given_sample, tmp_path / "a.pt", storage_dtype=storage_dtype)
    v1.write_sample(
        v1.FORMAT.read_sample(tmp_path / "a.pt"), tmp_path / "b.pt", storage_dtype=storage_dtype
    )
    content = torch.load(tmp_path / "a.pt", weights_only=True)

    values, scales = quantize_rows(sample.aux_hidden_states[0][:])
    assert torch.equal(content["hidden_states"][0].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(content[SCALES][0], 3 * scales)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("storage_dtype", ["bfloat16", "float8"])
@pytest.mark.parametrize("total_seq_len", [12, 23, 300])
def test_a_batch_of_compact_samples_is_that_of_their_values(
    tmp_path: Path, storage_dtype: v1.StorageDtype, total_seq_len: int
) -> None:
    samples = [make_sample(mask=m, seed=i) for i, m in enumerate([*MASKS, "two turns"])]
    samples.append(make_sample(num_tokens=200, seed=9))

    compact = []
    for i, sample in enumerate(samples):
        file = tmp_path / f"{i}.pt"
        v1.write_sample(sample, file, storage_dtype=storage_dtype, supervised_only=True)
        compact.append(v1.FORMAT.read_sample(file))
    if storage_dtype == "float8":
        samples = [
            replace(
                sample,
                aux_hidden_states=tuple(dequantized(x[:]) for x in sample.aux_hidden_states),
                last_hidden_states=dequantized(sample.last_hidden_states[:]),
            )
            for sample in samples
        ]

    expected = batch_of(*samples, total_seq_len=total_seq_len)
    assert len(expected.targets)
    batch = batch_of(*compact, total_seq_len=total_seq_len)
    assert (batch.float8 is not None) == (storage_dtype == "float8")
    assert_equal(batch.scale(), expected)


def test_float8_samples_stay_in_float8_until_they_are_scaled(tmp_path: Path) -> None:
    v1.write_sample(make_sample(), tmp_path / "a.pt", storage_dtype="float8", supervised_only=True)
    content = torch.load(tmp_path / "a.pt", weights_only=True)

    batch = batch_of(v1.FORMAT.read_sample(tmp_path / "a.pt"), total_seq_len=S - 1)

    assert batch.aux_hidden_states.shape == (S - 1, 0)
    assert batch.last_hidden_states.shape == (len(batch.targets), 0)
    assert batch.float8 is not None
    for layer in range(AUX):
        codes = batch.float8.aux.codes[:, layer]
        assert torch.equal(
            codes.view(torch.uint8), content["hidden_states"][layer][: S - 1].view(torch.uint8)
        )
        assert torch.equal(batch.float8.aux.scales[:, layer, 0], content[SCALES][layer][: S - 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("at_once", [1, 200, 2**24])
def test_a_batch_may_have_samples_in_float8_and_others(
    tmp_path: Path, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states_buffer, "SCALED_AT_ONCE", at_once)
    samples = [make_sample(seed=i) for i in range(4)]
    read = []
    for i, sample in enumerate(samples):
        v1.write_sample(sample, tmp_path / f"{i}.pt", storage_dtype=None if i % 2 else "float8")
        read.append(v1.FORMAT.read_sample(tmp_path / f"{i}.pt"))
    values = [
        replace(
            sample,
            aux_hidden_states=tuple(x[:] for x in sample.aux_hidden_states),
            last_hidden_states=sample.last_hidden_states[:],
        )
        for sample in read
    ]

    batch, expected = (batch_of(*x, total_seq_len=4 * S, dtype=dtype) for x in (read, values))

    assert batch.float8 is not None
    assert expected.float8 is None
    assert expected.aux_hidden_states.dtype == dtype
    assert_equal(batch.scale(), expected)
    assert_equal(batch.cast(torch.float32), expected.cast(torch.float32))


def test_a_batch_in_float8_moves_with_all_of_its_tensors(tmp_path: Path) -> None:
    v1.write_sample(make_sample(), tmp_path / "a.pt", storage_dtype="float8")
    batch = batch_of(v1.FORMAT.read_sample(tmp_path / "a.pt"))

    moved = batch.to(torch.device("meta"))

    assert moved.float8 is not None
    for rows in (moved.float8.aux, moved.float8.last):
        assert {x.device.type for x in (rows.codes, rows.scales, rows.places)} == {"meta"}


def test_compact_samples_are_cast_like_others(tmp_path: Path) -> None:
    v1.write_sample(make_sample(), tmp_path / "a.pt", storage_dtype="float8", supervised_only=True)
    sample = v1.FORMAT.read_sample(tmp_path / "a.pt")

    batch = collate(
        [0],
        [sample],
        total_seq_len=S,
        num_aux_layers=AUX,
        hidden_size=HIDDEN,
        dtype=torch.float32,
    )

    assert batch.cast(torch.float32).aux_hidden_states.any()
    assert_equal(batch.cast(torch.bfloat16), batch_of(sample, total_seq_len=S).scale())


def test_a_folder_of_float8_is_trained_in_bfloat16(tmp_path: Path) -> None:
    for i in range(3):
        v1.write_sample(make_sample(seed=i), tmp_path / f"{i}.pt", storage_dtype="float8")

    folder = read_folders(
        [tmp_path], version=1, index_file=None, max_bad_samples=None, progress=SilentProgress()
    )

    assert {header.dtype for header in folder.headers} == {"float8_e4m3fn"}
    assert folder.dtype == "bfloat16"
    assert folder.read(1).num_tokens == S


def test_a_file_that_has_shrunk_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    v1.write_sample(make_sample(), file, storage_dtype="float8", supervised_only=True)
    sample = v1.FORMAT.read_sample(file)
    file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(ChangedSampleError, match=r"a\.pt"):
        sample.last_hidden_states[sample.loss_mask]


Edit = Callable[[dict[str, Any]], object]


def scales_with(value: float) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        content[SCALES][2][4] = value

    return edit


DAMAGE: dict[str, tuple[Edit, str]] = {
    "no scales": (
        lambda x: x.pop(SCALES),
        "has float8 hidden states without `hidden_states_scales`",
    ),
    "no list": (lambda x: x.update({SCALES: torch.ones(S)}), "has no list of tensors"),
    "a number": (lambda x: x.update({SCALES: [1.0] * 4}), "has no list of tensors"),
    "an empty list": (lambda x: x.update({SCALES: []}), "has no list of tensors"),
    "a layer less": (lambda x: x[SCALES].pop(), "of 3 layers, expected 4"),
    "a row less": (
        lambda x: x[SCALES].__setitem__(1, torch.ones(S - 1)),
        "of shape [10] in layer 1, expected [11]",
    ),
    "a column": (lambda x: x[SCALES].__setitem__(0, torch.ones(S, 1)), "of shape [11, 1]"),
    "other scales": (lambda x: x[SCALES].__setitem__(0, torch.ones(S).half()), "of type float16"),
    "other states": (
        lambda x: x["hidden_states"].__setitem__(0, torch.ones(S, HIDDEN)),
        "of type float32, expected float8_e4m3fn",
    ),
    "other float8": (
        lambda x: x["hidden_states"].__setitem__(0, torch.ones(S, HIDDEN).to(torch.float8_e5m2)),
        "of type float8_e5m2",
    ),
    "NaN": (scales_with(torch.nan), "has negative or non-finite `hidden_states_scales` in layer 2"),
    "Inf": (scales_with(torch.inf), "in layer 2"),
    "negative": (scales_with(-1.0), "in layer 2"),
    "no flag": (lambda x: x.pop(ONLY), "has 11 input ids but 5 hidden states in layer 3"),
    "a false flag": (
        lambda x: x.update({ONLY: torch.tensor(False)}),
        "has 11 input ids but 5 hidden states in layer 3",
    ),
    "a text as flag": (lambda x: x.update({ONLY: "yes"}), "has no boolean as"),
    "two flags": (lambda x: x.update({ONLY: torch.ones(2)}), "has a flag of shape [2]"),
    "another mask": (
        lambda x: x["loss_mask"].fill_(True),
        "has 5 last hidden states for 11 supervised tokens",
    ),
}


@pytest.mark.parametrize(("edit", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_a_compact_sample_is_refused(tmp_path: Path, edit: Edit, reason: str) -> None:
    file = tmp_path / "a.pt"
    v1.write_sample(make_sample(), file, storage_dtype="float8", supervised_only=True)
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)

    for read in (v1.FORMAT.read_tokens, v1.FORMAT.read_sample):
        with pytest.raises(BadSampleError) as error:
            read(file)
        assert reason in error.value.reason


def test_a_flag_may_be_a_plain_value(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    v1.write_sample(make_sample(), file, supervised_only=True)
    torch.save(torch.load(file, weights_only=True) | {ONLY: True}, file)

    assert isinstance(v1.FORMAT.read_sample(file).last_hidden_states, SupervisedRows)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_compact_samples_are_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "sample.pt"
    v1.write_sample(make_sample(), file, storage_dtype="float8", supervised_only=True)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # The directory is at the end.
        position = data.draw(
            st.integers(0, len(content) - 1) | st.integers(1, 2500).map(lambda x: -x)
        )
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(1, len(content)) | st.just(len(content)))])

    with suppress(BadSampleError):
        sample = v1.FORMAT.read_sample(file)
        assert sample.last_hidden_states.shape[0] == sample.num_tokens
        layers_of(sample)

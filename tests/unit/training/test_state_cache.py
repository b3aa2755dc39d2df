"""A bounded cache of hidden states that are computed while training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.sample import ChangedSampleError
from speculators_cli.core.data.state_cache import Candidate, choose_cached
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.host_states import HostStates, Storage, round_states
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.errors import MachineError, SettingsError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from tests.tiny_run import LAYER_IDS, TinyInputs
from tests.token_files import make_rows, write_tokens

NUM_ROWS = 12
ALL = 10**9


@pytest.fixture
def tokens(tiny: TinyInputs) -> Path:
    return write_tokens(tiny.folder / "tokens", make_rows(NUM_ROWS))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of documents of each capture of a batch."""
    counts: list[int] = []
    real = TransformersEngine.capture

    def capture(engine: TransformersEngine, packed: Packed) -> CapturedStates:
        if packed.aux_rows is not None:
            counts.append(len(packed.lengths))
        return real(engine, packed)

    monkeypatch.setattr(TransformersEngine, "capture", capture)
    return counts


def run(tiny: TinyInputs, tokens: Path, name: str, **capture: Any) -> bytes:
    """The weights after a run."""
    save_path = tiny.folder / name
    settings = tiny.settings(
        draft={"target_layer_ids": LAYER_IDS},
        data={"data_path": (tokens,), "noise_std": 0.05},
        run={"save_path": save_path},
        schedule={"scheduler": "none"},
        capture=capture,
    )
    train(settings, progress=SilentProgress())
    return (save_path / "1" / "model.safetensors").read_bytes()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pt"))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8"])
def test_weights_do_not_depend_on_the_size_of_the_cache(
    dtype: str | None, tiny: TinyInputs, tokens: Path, captured: list[int]
) -> None:
    given = {} if dtype is None else {"cache_dtype": dtype}
    whole = tiny.folder / "whole"

    ends = [
        run(tiny, tokens, "none", cache_dir=tiny.folder / "a", cache_size=0, **given),
        run(tiny, tokens, "some", cache_dir=tiny.folder / "b", cache_size=25_000, **given),
        run(tiny, tokens, "all", cache_dir=whole, **given),
    ]
    captured.clear()
    ends.append(run(tiny, tokens, "again", cache_dir=whole, **given))

    assert len(set(ends)) == 1
    assert captured == []
    assert len(files(whole)) == NUM_ROWS
    assert files(tiny.folder / "a") == []
    assert 0 < len(files(tiny.folder / "b")) < NUM_ROWS
    size = sum(file.stat().st_size for file in files(tiny.folder / "b"))
    assert 5_000 < size <= 25_000
    plain = run(tiny, tokens, "plain")
    assert (plain == ends[0]) == (dtype is None)


def test_a_later_epoch_computes_the_samples_that_are_not_kept(
    tiny: TinyInputs, tokens: Path, captured: list[int]
) -> None:
    run(tiny, tokens, "some", cache_dir=tiny.folder / "b", cache_size=50_000)

    kept = len(files(tiny.folder / "b"))
    # Two epochs over all samples, of which the kept ones are computed in the first only.
    assert sum(captured) == 2 * NUM_ROWS - kept
    assert 0 < kept < NUM_ROWS


def candidates(count: int, first: int = 0) -> list[Candidate]:
    return [Candidate(f"{i:06d}", f"print-{i}", 100 + i) for i in range(first, first + count)]


def test_the_choice_is_of_lowest_hashes_with_validation_first() -> None:
    train_samples, validation = candidates(50), candidates(5, first=50)

    few = choose_cached((validation, train_samples), seed=1, num_bytes=5 * 154)
    more = choose_cached((validation, train_samples), seed=1, num_bytes=3000)
    reordered = choose_cached((validation[::-1], train_samples[::-1]), seed=1, num_bytes=3000)
    others = choose_cached((validation, train_samples), seed=2, num_bytes=3000)

    assert few == {x.fingerprint for x in validation}
    assert few < more == reordered != others
    assert sum(x.num_bytes for x in (*train_samples, *validation) if x.fingerprint in more) <= 3000
    assert len(choose_cached((validation, train_samples), seed=1, num_bytes=None)) == 55


def test_a_file_that_cannot_be_written_whole_is_absent_and_ends_the_run(
    tiny: TinyInputs, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(v1, "finish", fail)

    with pytest.raises(MachineError, match="No space left"):
        run(tiny, tokens, "full", cache_dir=tiny.folder / "cache")

    assert files(tiny.folder / "cache") == []


def test_a_damaged_file_is_named(tiny: TinyInputs, tokens: Path) -> None:
    run(tiny, tokens, "one", cache_dir=tiny.folder / "cache")
    for file in files(tiny.folder / "cache"):
        file.write_bytes(file.read_bytes()[:300])

    with pytest.raises(ChangedSampleError, match=r"cache/.*\.pt` can no longer be read"):
        run(tiny, tokens, "two", cache_dir=tiny.folder / "cache")


def test_states_that_are_not_finite_are_not_kept(
    tiny: TinyInputs, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = torch.from_numpy(make_rows(NUM_ROWS)[3].input_ids[:6])
    real = TransformersEngine.capture

    def capture(engine: TransformersEngine, packed: Packed) -> CapturedStates:
        states = real(engine, packed)
        found = (packed.input_ids.unfold(0, 6, 1) == poisoned).all(-1).nonzero().flatten()
        if packed.aux_rows is not None and len(found):
            states.aux[torch.searchsorted(packed.aux_rows, found[0]), 1] = torch.nan
        return states

    monkeypatch.setattr(TransformersEngine, "capture", capture)

    run(tiny, tokens, "one", cache_dir=tiny.folder / "cache")

    assert len(files(tiny.folder / "cache")) == NUM_ROWS - 1


def test_a_cache_without_live_samples_is_refused(tiny: TinyInputs) -> None:
    with pytest.raises(SettingsError, match="`--cache-dir` is of no use"):
        run(tiny, tiny.data_dir, "stored", cache_dir=tiny.folder / "cache")
    with pytest.raises(SettingsError, match="`--capture-dtype`, `--shard-verifier` are of no use"):
        run(tiny, tiny.data_dir, "stored", capture_dtype="float32", shard_verifier=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", ["bfloat16", "float8"])
def test_rounding_gives_the_bits_that_are_read_back(storage: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-6, 3, 40)[:, None]
    states = CapturedStates((torch.randn(40, 48) * scale).to(dtype), torch.randn(9, 16).to(dtype))
    given = Storage(storage, has_all_last_states=False)

    found = round_states(states, given)

    stored = HostStates(states, given)
    aux = torch.cat([layer[:].to(dtype) for layer in stored.aux(slice(0, 40))], dim=1)
    assert torch.equal(found.aux, aux)
    assert torch.equal(found.last, stored.last(slice(0, 9))[:].to(dtype))
    assert not torch.equal(found.aux, states.aux) or dtype == torch.bfloat16

"""The connector that runs within vLLM: its files, and the states it takes from the cache."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 4
STOCK = "vllm.distributed.kv_transfer.kv_connector.v1"
NAME = "speculators_cli.core.engines.vllm_connector"
Save = Callable[[dict[str, Tensor], str], None]


class Stock:
    """The connector of vLLM, as far as ours builds on it."""

    save: Save = staticmethod(save_file)

    def __init__(self, cache: Tensor, *_: object) -> None:
        self._kv_cache = cache
        self._block_size = BLOCK
        self._is_tp_rank_zero = True
        self._executor = ThreadPoolExecutor(1)
        self._req_copy_events: dict[str, Any] = {}
        self._req_futures: dict[str, Future[None]] = {}

    @classmethod
    def _write_tensors(cls, tensors: dict[str, Tensor], event: Any, file: str, _lock: None) -> None:
        event.synchronize()
        Stock.save(tensors, file)

    def _on_write_done(self, req_id: str, future: Future[None]) -> None:
        assert self._req_futures.pop(req_id) is future


def extract_from_kv_cache(cache: Tensor, slots: Tensor, num_tokens: int) -> Tensor:
    return cache[slots // BLOCK, :, slots % BLOCK][:num_tokens]


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stock = SimpleNamespace(
        ExampleHiddenStatesConnector=Stock, extract_from_kv_cache=extract_from_kv_cache
    )
    module: Any = ModuleType(STOCK)
    module.example_hidden_states_connector = stock
    monkeypatch.setitem(sys.modules, STOCK, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    found = import_module(NAME)
    monkeypatch.delitem(sys.modules, NAME)
    return found


def write(connector: ModuleType, folder: Path) -> tuple[Tensor, Any]:
    """Write the states of 6 tokens, in blocks 3 and 1; the cache, and the copy's event."""
    cache = torch.randn(5, 2, BLOCK, 3)  # blocks, layers, tokens, hidden
    pending = SimpleNamespace(
        req_id="a", filename=str(folder / "a"), token_ids=torch.arange(6), block_ids=[3, 1]
    )
    writer = connector.FileConnector(cache, None, None)
    writer._submit_async_write(pending)
    writer._executor.shutdown(wait=True)
    return cache, writer._req_copy_events["a"]


def test_states_are_those_of_the_blocks_in_their_order(
    connector: ModuleType, tmp_path: Path
) -> None:
    cache, event = write(connector, tmp_path)

    found = load_file(tmp_path / "a")

    expected = torch.cat([cache[3], cache[1, :, :2]], dim=1).transpose(0, 1)
    torch.testing.assert_close(found["hidden_states"], expected, rtol=0, atol=0)
    assert found["token_ids"].tolist() == [*range(6)]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert event.query()


def test_a_file_that_cannot_be_written_leaves_its_reason(
    connector: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: dict[str, Tensor], file: str) -> None:
        Path(file).write_bytes(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(Stock, "save", fail)

    write(connector, tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == ["a.failed"]
    assert str((tmp_path / "a.failed").readlink()) == "OSError: No space left on device"


def test_flags_name_the_layers_the_folder_and_the_connector(connector: ModuleType) -> None:
    flags = connector.capture_flags([2, 8], "/folder")

    values = dict(zip(flags[0:4:2], map(json.loads, flags[1:4:2]), strict=True))
    draft = values["--speculative-config"]["draft_model_config"]["hf_config"]
    transfer = values["--kv-transfer-config"]
    assert draft == {"eagle_aux_hidden_state_layer_ids": [2, 8]}
    assert transfer["kv_connector_extra_config"]["shared_storage_path"] == "/folder"
    assert hasattr(connector, transfer["kv_connector"])
    assert Path(str(connector.__file__)).stem == transfer["kv_connector_module_path"]
    assert flags[4:] == ["--no-enable-prefix-caching"]

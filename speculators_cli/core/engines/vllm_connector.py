"""vLLM's hidden-state extraction: how it is configured, and the connector that writes the files.

Imported by vLLM under an interpreter that may not have this package. The connector interface of
vLLM is experimental: nothing else depends on it. Read in 0.24 to 0.33, run in 0.32.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import (
    example_hidden_states_connector as stock,
)

FAILED = ".failed"  # suffix of the file that is written in place of states
PARTIAL = ".part"


def capture_flags(layer_ids: Sequence[int], states_dir: str) -> list[str]:
    """Return the engine's flags for writing the states of every prompt to a folder.

    Args:
        layer_ids: Ascending, each once: the engine sorts its layers, but counts those listed.
        states_dir: The folder.
    """
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {
            "hf_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)},
        },
    }
    transfer = {
        "kv_connector": FileConnector.__name__,
        "kv_connector_module_path": Path(__file__).stem,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {
            "shared_storage_path": states_dir,
            "use_synchronization_lock": False,  # a file appears when it is whole
        },
    }
    return [
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(transfer)),
        "--no-enable-prefix-caching",
    ]


class FileConnector(stock.ExampleHiddenStatesConnector):  # type: ignore[misc]
    """Writes the states of each request to a file that appears when it is whole, also on a CPU."""

    # Named: the factory looks for `kv_cache_config` in the signature.
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)

    @staticmethod
    def _write_tensors(tensors: dict[str, torch.Tensor], event: Any, file: str, *rest: Any) -> None:
        try:
            write = stock.ExampleHiddenStatesConnector._write_tensors  # noqa: SLF001
            write(tensors, event, file + PARTIAL, *rest)
            Path(file + PARTIAL).replace(file)
        except BaseException as error:
            Path(file + PARTIAL).unlink(missing_ok=True)
            # A full disk has room for a name.
            Path(file + FAILED).symlink_to(f"{type(error).__name__}: {error}"[:1000])
            raise

    def _submit_async_write(self, pending: Any) -> None:
        if self._kv_cache.device.type != "cpu":
            super()._submit_async_write(pending)
            return
        # The inherited method copies to pinned memory on a stream: a CPU has neither.
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        states = stock.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        copied = Copied()
        self._req_copy_events[pending.req_id] = copied
        future = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, None)
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))


class Copied:
    """The event of a copy that has ended."""

    def query(self) -> bool:
        """Whether the copy has ended."""
        return True

    def synchronize(self) -> None:
        """Wait for its end."""

"""The vLLM of a training run: one on each machine, which its ranks share."""

import os
import tempfile
from pathlib import Path

import torch

from speculators_cli.core.engines.ahead_capturer import AheadCapturer
from speculators_cli.core.engines.capture_gpus import choose_capture_gpus, list_gpus
from speculators_cli.core.engines.captured_layers import CapturedLayers
from speculators_cli.core.engines.document_stream import DocumentStream, VLLMStream
from speculators_cli.core.engines.shared_stream import StreamClient, StreamServer
from speculators_cli.core.engines.vllm_args import parse_vllm_args
from speculators_cli.core.engines.vllm_engine import fingerprint_of
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.engines.vllm_version import (
    OLDEST_CAPTURE,
    check_version,
    find_python,
    read_versions,
)
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.settings.train import TrainSettings

# How training calls what other commands set by these flags.
FLAGS = {"--dtype": "--capture-dtype", "--tensor-parallel-size": "--capture-gpus"}


def open_vllm(
    settings: TrainSettings, inputs: Inputs, ranks: Ranks, dtype: torch.dtype
) -> AheadCapturer:
    """Return what requests hidden states from vLLM; all ranks must call.

    Rank 0 has the process of vLLM, which is loaded with the first request of any rank.

    Raises:
        SettingsError: There are too few GPUs, or several machines.
        MachineError: vLLM is missing or too old.
    """
    given = settings.capture
    if ranks.num_local_ranks != ranks.num_ranks:
        raise SettingsError(
            "`--capture-engine vllm` works on one machine, but there are ranks on several",
            hint="Store the hidden states with `speculators generate-data --engine vllm`",
        )
    gpus = None
    if ranks.device.type == "cuda":
        visible = list_gpus(os.environ, torch.cuda.device_count())
        gpus = choose_capture_gpus(visible, ranks.num_local_ranks, given.capture_gpus)
    setup = VLLMSetup(
        settings.draft.verifier_name_or_path,
        str(dtype).removeprefix("torch."),
        python=given.vllm_python,
        tensor_parallel_size=given.capture_gpus,
        args=parse_vllm_args(given.vllm_args, FLAGS),
        trust_remote_code=settings.draft.trust_remote_code,
        gpus=gpus,
    )
    python = find_python(setup.python)
    versions = read_versions(python)
    check_version(versions, OLDEST_CAPTURE, python, what="Hidden states")
    layers = CapturedLayers(inputs.layer_ids.ids, inputs.verifier_config.num_layers)
    return AheadCapturer(
        _reach(setup, layers, ranks),
        layers,
        fingerprint=fingerprint_of(setup, versions),
        dtype=dtype,
        hidden_size=inputs.verifier_config.hidden_size,
        device=ranks.device,
    )


def _reach(setup: VLLMSetup, layers: CapturedLayers, ranks: Ranks) -> DocumentStream:
    """Return the stream of rank 0, or a connection to it."""
    if ranks.num_ranks == 1:
        return VLLMStream(setup, layers)
    if ranks.is_first:
        # Paths of sockets are limited to some hundred bytes, and `TMPDIR` may be longer.
        folder = Path(tempfile.mkdtemp(prefix="speculators-vllm-", dir="/tmp"))
        server = StreamServer(VLLMStream(setup, layers), folder)
        ranks.share("vllm", str(folder))
        return server
    return StreamClient(Path(ranks.share("vllm", None)))

"""Job: the verifier, folder and rank of one run of `generate-data`, checked before it starts."""

import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.capture.generated_folder import GeneratedFolder
from speculators_cli.core.capture.render import Renderer
from speculators_cli.core.data.data_config import choose_captured_layers
from speculators_cli.core.engines.devices import choose_device, choose_dtype
from speculators_cli.core.engines.engine import Sampling
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.verifier import VerifierConfig, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_tokens import load_verifier_tokens
from speculators_cli.core.place import Place, adopt_slurm, read_place
from speculators_cli.settings.generate_data import GenerateDataSettings


@dataclass(frozen=True)
class Job:
    """Everything that both stages need, except the verifier's weights."""

    settings: GenerateDataSettings
    folder: GeneratedFolder
    files: VerifierFiles
    config: VerifierConfig
    tokenizer: Any
    end_ids: frozenset[int]
    vocab_size: int
    layer_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    place: Place

    @property
    def trusts_remote_code(self) -> bool:
        """Whether custom code of the verifier may run."""
        return self.settings.verifier.trust_remote_code

    @property
    def sampling(self) -> Sampling:
        """How answers are chosen."""
        tokens = self.settings.tokens
        return Sampling(tokens.max_new_tokens, tokens.temperature, tokens.top_p)

    @property
    def max_tokens(self) -> int:
        """Maximum length of a row: the verifier may have positions for less than is asked for."""
        return min(self.settings.tokens.total_seq_len, self.config.max_position_embeddings)

    def all_shards(self, num_rows: int) -> range:
        """Return the shards of an input of so many rows."""
        return range(-(-num_rows // self.settings.input.shard_size))

    def own_shards(self, num_rows: int) -> range:
        """Return those of this rank."""
        return self.all_shards(num_rows)[self.place.rank :: self.place.num_ranks]

    def build_renderer(self) -> Renderer:
        """Return a renderer of the verifier's tokenizer and chat template."""
        tokens = self.settings.tokens
        return Renderer(
            self.tokenizer,
            end_ids=self.end_ids,
            thinking=None if tokens.thinking is None else tokens.thinking == "on",
            max_tokens=self.max_tokens,
            vocab_size=self.vocab_size,
        )

    @cached_property
    def weights_hash(self) -> str:
        """Hash of the verifier's config, and of parts of its weights."""
        return self.files.hash_parts()[:16]

    @cached_property
    def template_hash(self) -> str | None:
        """Hash of the chat template; None if there is none."""
        template = self.tokenizer.chat_template
        return None if not template else sha256(str(template).encode()).hexdigest()[:16]


def open_job(settings: GenerateDataSettings) -> Job:
    """Read the verifier's config and tokenizer, and find the device and the rank.

    Raises:
        SettingsError: The verifier or a setting cannot be used.
        MachineError: There is no such device, or the hub cannot be reached.
    """
    adopt_slurm(os.environ)
    place = read_place(os.environ)
    given = settings.verifier
    files = VerifierFiles(given.verifier_name_or_path)
    config = read_verifier_config(files, trust_remote_code=given.trust_remote_code)
    tokens = load_verifier_tokens(files, config, trust_remote_code=given.trust_remote_code)
    if settings.engine.engine == "vllm" and place.num_ranks > 1:
        raise SettingsError(
            f"`--engine vllm` on {place.num_ranks} ranks: vLLM divides the work itself",
            hint="Pass `--tensor-parallel-size` instead of `--nproc-per-node`",
        )
    device = choose_device(settings.engine.device, place)
    return Job(
        settings=settings,
        folder=GeneratedFolder(settings.input.output_dir),
        files=files,
        config=config,
        tokenizer=tokens.tokenizer,
        end_ids=tokens.end_ids,
        vocab_size=tokens.vocab_size,
        layer_ids=choose_captured_layers(
            given.target_layer_ids,
            config.num_layers,
            ALGORITHMS[given.algorithm].num_aux_layers,
        ),
        device=device,
        dtype=choose_dtype(given.dtype, device),
        place=place,
    )

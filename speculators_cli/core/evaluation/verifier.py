"""LoadedVerifier: the whole verifier in this process, for drafting and verifying."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.conversations.encoder import Encoder
from speculators_cli.core.engines.row_verifier import CachedRows, RowVerifier, open_rows
from speculators_cli.core.engines.transformers_engine import load_model
from speculators_cli.core.models.verifier import VerifierConfig, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_tokens import VerifierTokens, load_verifier_tokens

MEMORY_HINT = "Pass `--dtype bfloat16`, or a machine with more memory"


@dataclass(frozen=True, eq=False)
class LoadedVerifier:
    """A verifier that is ready to compute."""

    name: str
    rows: RowVerifier
    tokens: VerifierTokens
    embedding: Tensor  # [vocab, hidden]
    head: Tensor  # [vocab, hidden]: of the LM head
    is_batched: bool  # False: one prompt at a time, without a KV cache

    def encode(self, text: str) -> list[int]:
        """Encode a text as token ids, after the begin token if the verifier has one."""
        encoder = Encoder(self.tokens.tokenizer, self.tokens.vocab_size)
        (ids,) = encoder.encode([text])
        return [*encoder.begin.tolist(), *ids.tolist()]


def load_verifier(
    files: VerifierFiles,
    layer_ids: Iterable[int],
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    config: VerifierConfig | None = None,
    tokens: VerifierTokens | None = None,
    trust_remote_code: bool = False,
    memory_hint: str = MEMORY_HINT,
) -> LoadedVerifier:
    """Load a verifier with its tokenizer.

    Args:
        files: Of the verifier.
        layer_ids: Aux layers that the draft reads, ascending.
        dtype: Of its weights and computations.
        device: Default: the CPU.
        config: If it was read before.
        tokens: If they were loaded before.
        trust_remote_code: Whether custom code from the verifier's repository may run.
        memory_hint: What to do if it does not fit.

    Raises:
        SettingsError: It cannot be loaded.
        MachineError: It does not fit into memory, or the hub cannot be reached.
    """
    config = config or read_verifier_config(files, trust_remote_code=trust_remote_code)
    tokens = tokens or load_verifier_tokens(files, config, trust_remote_code=trust_remote_code)
    model = load_model(
        files.name_or_path,
        dtype=dtype,
        device=device or torch.device("cpu"),
        trust_remote_code=trust_remote_code,
        memory_hint=memory_hint,
    )
    rows = open_rows(model, tuple(layer_ids), name=files.name_or_path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return LoadedVerifier(
        files.name_or_path,
        rows,
        tokens,
        embedding.weight.detach(),
        head.weight.detach(),
        is_batched=isinstance(rows, CachedRows),
    )

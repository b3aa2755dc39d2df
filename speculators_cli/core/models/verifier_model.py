"""VerifierModel: the whole verifier, for capture and evaluation."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles


@dataclass(frozen=True)
class VerifierOutput:
    """Output of one forward pass over new tokens of one sequence."""

    logits: Tensor  # [new, vocab], float32
    aux_hidden_states: tuple[Tensor, ...]  # [new, hidden] for each layer id
    last_hidden_states: Tensor  # [new, hidden], before the final norm


class VerifierModel:
    """A verifier with greedy decoding that returns the hidden states a draft reads.

    Args:
        name_or_path: A folder or hub id.
        layer_ids: Aux layers; id k is the output after k layers.
        dtype: Of its weights and computations.
        trust_remote_code: Whether custom code from the verifier's repository may run.

    Raises:
        SettingsError: It cannot be loaded.
    """

    def __init__(
        self,
        name_or_path: str,
        layer_ids: Sequence[int],
        *,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        logging.disable_progress_bar()
        files = VerifierFiles(name_or_path)
        self.tokenizer: Any = load_tokenizer(files, trust_remote_code=trust_remote_code)
        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                name_or_path, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SettingsError(
                f"Verifier `{name_or_path}` cannot be loaded: {reason}",
                hint="Pass a folder or hub id with `config.json` and `.safetensors` weights",
            ) from None
        self.layer_ids = tuple(layer_ids)
        # transformers 5.24 renamed it.
        names = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._before_norm: Tensor | None = None
        norm = self.model.get_decoder().norm
        norm.register_forward_pre_hook(self._keep_last_hidden_states)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids of the end tokens, from the generation config and the tokenizer."""
        given = self.model.generation_config.eos_token_id
        ids = given if isinstance(given, list) else [given, self.tokenizer.eos_token_id]
        return frozenset(i for i in ids if i is not None)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def encode(self, text: str) -> list[int]:
        """Encode a text as token ids, after the begin token if the verifier has one."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        return ids if begin is None else [begin, *ids]

    def new_cache(self) -> DynamicCache:
        """Return an empty KV cache for one sequence."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def run(
        self,
        tokens: Tensor,  # [new], int64
        cache: DynamicCache | None = None,
    ) -> VerifierOutput:
        """Run a forward pass over new tokens, appended to those in the cache."""
        out = self.model(
            input_ids=tokens[None],
            use_cache=cache is not None,
            output_hidden_states=True,
            **({} if cache is None else {self._cache_name: cache}),
        )
        last = self._before_norm
        assert last is not None, "the hook has run"
        # transformers applies the final norm to its last entry: that one comes from the hook.
        layers = [*out.hidden_states[:-1], last]
        return VerifierOutput(
            logits=out.logits[0].float(),
            aux_hidden_states=tuple(layers[k][0] for k in self.layer_ids),
            last_hidden_states=last[0],
        )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Generate greedy answers to a batch of prompts, up to and including an end token."""
        longest = max(len(prompt) for prompt in prompts)
        pad = next(iter(self.end_ids), 0)
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        device = self.model.device
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        return [self._up_to_end(row) for row in out[:, longest:].tolist()]

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(tokens) if token in self.end_ids]
        return tokens[: ends[0] + 1] if ends else tokens

    def _keep_last_hidden_states(self, _: object, arguments: tuple[Tensor, ...]) -> None:
        self._before_norm = arguments[0]

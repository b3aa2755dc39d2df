"""Token ids of texts, by the verifier's tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.errors import SettingsError

Ids = NDArray[np.int32]  # [seq_len]
Mask = NDArray[np.bool_]  # [seq_len]
PROBE = "a"


class Encoder:
    """Encodes texts in batches.

    Args:
        tokenizer: Of transformers.
        vocab_size: Number of rows of the verifier's embedding.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.has_offsets = bool(tokenizer.is_fast)
        # What the tokenizer itself puts around a text.
        bare = self._encode_one(PROBE, add_special_tokens=False)
        whole = self._encode_one(PROBE, add_special_tokens=True)
        places = range(len(whole) - len(bare) + 1)
        start = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
        self.begin = np.array(whole[:start], np.int32)
        self.end = np.array(whole[start + len(bare) :], np.int32)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts that have their special tokens already.

        Raises:
            SettingsError: The verifier has no embedding of a token.
        """
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        arrays = [np.array(ids, np.int32) for ids in encoded]
        highest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
        if highest >= self._vocab_size:
            raise SettingsError(
                f"The tokenizer of `{self._tokenizer.name_or_path}` has the token id {highest:,}, "
                f"the verifier has embeddings of {self._vocab_size:,} tokens",
                hint="Pass a verifier with its own tokenizer",
            )
        return arrays

    def decode(self, ids: Ids) -> str:
        """Return the text of tokens, including special ones."""
        return str(self._tokenizer.decode(ids.tolist()))

    def _encode_one(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

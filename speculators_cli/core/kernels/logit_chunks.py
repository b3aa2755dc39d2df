"""How many rows the loss takes at once."""

# Draft logits at once. Each chunk reads and writes the whole gradient of the lm_head, so a wide
# vocabulary wants long chunks, and memory short ones.
MAX_LOGITS = 2**28
MIN_ROWS, MAX_ROWS = 2048, 4096


def chunk_size(num_steps: int, draft_vocab_size: int) -> int:
    """Rows that the loss takes at once, each with all its predictions."""
    return min(max(MAX_LOGITS // (num_steps * draft_vocab_size), MIN_ROWS), MAX_ROWS)

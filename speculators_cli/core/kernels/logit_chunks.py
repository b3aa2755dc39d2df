"""Number of rows per chunk of the loss."""

# Draft logits per chunk. Each chunk reads and writes the whole gradient of the LM head: wide
# vocabularies need long chunks for speed, and short ones for memory.
MAX_LOGITS = 2**28
MAX_BLOCK_LOGITS = 2**27
MIN_ROWS, MAX_ROWS = 2048, 4096


def chunk_size(num_steps: int, draft_vocab_size: int) -> int:
    """Return the number of rows per chunk of the loss, each with all its predictions."""
    return min(max(MAX_LOGITS // (num_steps * draft_vocab_size), MIN_ROWS), MAX_ROWS)


def block_chunk_size(num_predictions: int, draft_vocab_size: int) -> int:
    """Return the number of blocks per chunk of their loss, each with all its predictions."""
    return max(MAX_BLOCK_LOGITS // (num_predictions * draft_vocab_size), 1)

"""BlockDrafter: fills in a block after the verified tokens, as vLLM drafts with DFlash."""

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.attention import BlockSpans
from speculators_cli.core.algorithms.dflash.draft import Context, DFlashDraft


class BlockDrafter:
    """Drafts for one sequence at a time.

    The context grows with the verified positions; the anchor is the newest token, whose own hidden
    states the verifier has not computed. Nothing of a block is kept.

    Args:
        draft: In `eval()`; its block is the anchor and the tokens to draft.
        kept_ids: [draft_vocab], int64: the verifier ids of draft ids.
    """

    def __init__(self, draft: DFlashDraft, kept_ids: Tensor) -> None:
        self.draft = draft
        self.kept_ids = kept_ids
        self.num_draft_tokens = draft.config.num_draft_tokens
        self.start()

    def start(self) -> None:
        """Begin a new sequence."""
        self.context: Context = ()
        self.num_positions = 0

    @torch.inference_mode()
    def propose(
        self,
        tokens: Tensor,  # [new], int64: the verified tokens after those positions
        aux_hidden_states: tuple[Tensor, ...],  # [new, hidden] each, of positions not yet seen
    ) -> list[int]:
        """Process newly verified positions, then draft after the last of `tokens`."""
        return self.kept_ids[self.compute_logits(tokens, aux_hidden_states).argmax(-1)].tolist()

    def compute_logits(self, tokens: Tensor, aux_hidden_states: tuple[Tensor, ...]) -> Tensor:
        """Logits of the tokens after the last of `tokens`; [draft tokens, draft_vocab]."""
        return self.draft.logits(self.fill_in(tokens, aux_hidden_states))

    def fill_in(self, tokens: Tensor, aux_hidden_states: tuple[Tensor, ...]) -> Tensor:
        """What the LM head reads for each draft token; [draft tokens, hidden]."""
        aux = torch.cat(aux_hidden_states, dim=-1)
        positions = torch.arange(len(tokens), device=tokens.device) + self.num_positions
        new = self.draft.read_context(aux, positions)
        if self.context:
            new = [
                (torch.cat((key, new_key)), torch.cat((value, new_value)))
                for (key, value), (new_key, new_value) in zip(self.context, new, strict=True)
            ]
        self.context = new
        self.num_positions += len(tokens)
        last = self.num_positions - 1
        normed = self.draft.fill_in(
            tokens[-1:],
            tokens.new_tensor([self.num_positions]),
            self.context,
            BlockSpans((0, 1), (0, self.num_positions), (last,)),
            tokens.new_tensor([last]),
        )
        return normed[0, self.draft.config.first_slot :]

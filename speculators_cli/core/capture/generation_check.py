"""The masks of the first rows against what the chat template itself marks as generated."""

import numpy as np

from speculators_cli.core.capture.rendered import shorten
from speculators_cli.core.capture.turns import RowPlan
from speculators_cli.core.conversations.chat_template import ChatTemplate
from speculators_cli.core.conversations.encoder import Encoder, Ids, Mask
from speculators_cli.core.errors import DataError


class GenerationCheck:
    """Compares masks with the generation blocks of a template, where it has them.

    Templates draw these blocks with different care. So the tokens of generation prompts, end
    tokens and blank ones may differ; the text of the answers may not. Earlier answers of a row
    that has only its last one supervised are not compared.

    Args:
        template: Nothing is compared if it has no generation blocks.
        encoder: Of its tokenizer.
        end_ids: The verifier's end tokens.
        num_rows: Number of first rows to compare.
    """

    def __init__(
        self, template: ChatTemplate, encoder: Encoder, end_ids: Ids, *, num_rows: int
    ) -> None:
        self._template = template
        self._encoder = encoder
        self._end_ids = end_ids
        self._num_rows = num_rows if encoder.has_offsets else 0

    def check(self, row: RowPlan, input_ids: Ids, loss_mask: Mask) -> None:
        """Compare one of the first rows.

        Raises:
            DataError: They differ.
        """
        if self._num_rows == 0 or not self._template.has_generation_blocks:
            return
        self._num_rows -= 1
        last = row.turns[-1]
        ids, marks = self._template.mark_generated(last.messages, last.tools)
        if not np.array_equal(ids, input_ids):
            return
        generated = np.array(marks, np.bool_)
        compared = self._find_compared(row, input_ids)
        differing = np.flatnonzero(compared & (generated != loss_mask))
        if not any(self._encoder.decode(input_ids[i : i + 1]).strip() for i in differing):
            return
        raise DataError(
            f"The chat template of the verifier marks other tokens of `{row.name}` as generated "
            "than were found by comparing the prompt with the whole conversation:\n"
            f"  template: {self._text(input_ids, generated & compared)}\n"
            f"  compared: {self._text(input_ids, loss_mask)}",
            hint="Correct the `{% generation %}` blocks of the chat template, or remove them",
        )

    def _find_compared(self, row: RowPlan, input_ids: Ids) -> Mask:
        """Return the tokens that must be equal."""
        compared = ~np.isin(input_ids, self._end_ids)
        for turn in row.turns:
            texts = [self._template.render(turn.history, turn.tools), turn.prompt]
            history, prompt = (len(ids) for ids in self._encoder.encode(texts))
            if turn is row.turns[0]:
                compared[:history] = False
            compared[history:prompt] = False
        return compared

    def _text(self, input_ids: Ids, mask: Mask) -> str:
        return shorten(self._encoder.decode(input_ids[mask]))

"""Regeneration turn by turn, with an engine that has its answers written down."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from speculators_cli.core.capture.answers import (
    Regeneration,
    read_answer,
    write_script,
)
from speculators_cli.core.capture.rendered import PROMPT_TOO_LONG, TRUNCATED, Rendered
from speculators_cli.core.conversations.prompts import Conversation, Message, Source, parse_row
from speculators_cli.core.engines.engine import Answer, Prompt, Sampling
from speculators_cli.core.engines.sampling import seed_of
from tests.unit.capture.chat_templates import (
    BASE,
    CHATML,
    DEEPSEEK_R1,
    HARMONY,
    QWEN_3,
    Family,
    assistant,
    make_renderer,
    make_tokenizer,
    marked,
    names,
    user,
)

SAMPLING = Sampling(max_new_tokens=40, temperature=0.5)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CUT = "…"  # the reply reaches the limit here
# A template that takes no system message, as some do.
NO_SYSTEM = Family(
    template="{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML.template,
    end_tokens=CHATML.end_tokens,
)


class ScriptedAnswerer:
    """Answers each prompt by the reply to the words that it ends with, the last prompt first."""

    fingerprint: Mapping[str, str] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerFast, replies: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._replies = replies
        self.calls: list[list[str]] = []  # the prompts of each call
        self.seeds: list[int] = []
        self.samplings: list[Sampling] = []

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        texts = [str(self._tokenizer.decode(list(prompt.ids))) for prompt in prompts]
        self.calls.append(texts)
        self.seeds += [prompt.seed for prompt in prompts]
        self.samplings.append(sampling)
        for index in reversed(range(len(prompts))):
            last = max(self._replies, key=texts[index].rfind)
            reply = self._replies[last]
            ids = self._tokenizer(reply.removesuffix(CUT))["input_ids"]
            yield Answer(index, ids, reply.endswith(CUT))

    def close(self) -> None:
        pass


def regenerate(
    rows: Sequence[Mapping[str, Any]],
    replies: Mapping[str, str],
    *,
    family: Family = CHATML,
    max_tokens: int = 4096,
    keeps_truncated: bool = True,
    first_index: int = 0,
) -> tuple[list[Rendered], ScriptedAnswerer, PreTrainedTokenizerFast]:
    """Answer rows of the input."""
    renderer, tokenizer = make_renderer(family, max_tokens=max_tokens)
    answerer = ScriptedAnswerer(tokenizer, replies)
    regeneration = Regeneration(
        renderer,
        answerer,
        tokenizer,
        sampling=SAMPLING,
        seed=3,
        max_tokens=max_tokens,
        keeps_truncated=keeps_truncated,
    )
    sources: list[Source] = [parse_row(row, i) for i, row in enumerate(rows, start=first_index)]
    return regeneration.answer_all(sources), answerer, tokenizer


def chat(*messages: Message) -> dict[str, Any]:
    return {"messages": list(messages)}


def test_later_prompts_have_the_answers_that_were_generated() -> None:
    row = chat(user("Two?"), assistant("Old."), user("Three?"), assistant("Old, too."))
    replies = {"Two?": "Zwei.<|im_end|>", "Three?": "Drei.<|im_end|>"}

    (rendered,), answerer, tokenizer = regenerate([row], replies)

    first = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    second = f"{first}Zwei.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"
    assert answerer.calls == [[first], [second]]
    assert marked(tokenizer, rendered) == [
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦Zwei.<|im_end|>⟧\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n⟦Drei.<|im_end|>⟧"
    ]
    assert names(rendered) == ["000000"]
    assert (rendered.num_turns, rendered.num_without_end, rendered.left_out) == (2, 0, ())


def test_a_template_that_rewrites_history_gets_a_row_for_each_answer() -> None:
    row = chat(user("Two?"), assistant("Old."), user("Three?"))
    replies = {"Two?": "(Eins.) Zwei.<|im_end|>", "Three?": "() Drei.<|im_end|>"}
    # Thoughts are in brackets, and dropped from earlier answers.
    drop_thoughts = "message.content.split(') ')[-1]"
    family = Family(CHATML.template.replace("message.content", drop_thoughts), CHATML.end_tokens)

    (rendered,), _, tokenizer = regenerate([row], replies, family=family, first_index=12)

    assert names(rendered) == ["000012-turn1", "000012-turn2"]
    assert marked(tokenizer, rendered) == [
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦(Eins.) Zwei.<|im_end|>⟧",
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nZwei.<|im_end|>\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"
        "⟦() Drei.<|im_end|>⟧",
    ]


def test_all_conversations_of_a_turn_are_answered_together() -> None:
    rows = [
        chat(user("Two?"), assistant("a"), user("Three?")),
        {"prompt": "Four?"},
        {"text": "It is given."},
        chat(user("Five?"), assistant("b"), user("Six?"), assistant("c"), user("Seven?")),
    ]
    replies = {f"{n}?": f"{n}.<|im_end|>" for n in ["Two", "Three", "Four", "Five", "Six", "Seven"]}

    rendered, answerer, tokenizer = regenerate(rows, replies)

    assert [len(call) for call in answerer.calls] == [3, 2, 1]
    assert [names(one) for one in rendered] == [["000000"], ["000001"], ["000002"], ["000003"]]
    texts = [marked(tokenizer, one)[0] for one in rendered]
    assert [text.count("⟦") for text in texts] == [2, 1, 1, 3]
    assert texts[1].endswith("Four?<|im_end|>\n<|im_start|>assistant\n⟦Four.<|im_end|>⟧")
    assert texts[2] == "⟦It is given.⟧"
    assert answerer.samplings == [SAMPLING] * 3


def test_tool_calls_of_the_input_are_kept_and_not_supervised() -> None:
    row = chat(
        user("Two and three?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "5"},
        assistant("Old."),
        user("And one?"),
    )
    replies = {"5": "Five.<|im_end|>", "And one?": "Six.<|im_end|>"}

    (rendered,), answerer, tokenizer = regenerate([row], replies, family=QWEN_3)

    assert len(answerer.calls) == 2
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>\n'
    last = marked(tokenizer, rendered)[-1]
    assert call in last
    assert "⟦" not in last[: last.index(call) + len(call)]
    assert last.endswith("And one?<|im_end|>\n<|im_start|>assistant\n⟦Six.<|im_end|>⟧")


@pytest.mark.parametrize("keeps_truncated", [True, False])
def test_a_truncated_answer_ends_its_conversation(keeps_truncated: bool) -> None:
    row = chat(user("Two?"), assistant("a"), user("Three?"), assistant("b"), user("Four?"))
    replies = {"Two?": "Zwei.<|im_end|>", "Three?": f"Drei, dr{CUT}", "Four?": "Vier.<|im_end|>"}

    (rendered,), answerer, tokenizer = regenerate([row], replies, keeps_truncated=keeps_truncated)

    assert len(answerer.calls) == 2
    (text,) = marked(tokenizer, rendered)
    assert text.endswith("⟦Drei, dr⟧" if keeps_truncated else "⟦Zwei.<|im_end|>⟧")
    assert rendered.num_turns == 2
    assert rendered.num_without_end == keeps_truncated
    reasons = [(left.name, left.reason, left.text) for left in rendered.left_out]
    assert reasons == ([] if keeps_truncated else [("000000-turn2", TRUNCATED, "Drei, dr")])


def test_prompts_that_leave_no_room_for_an_answer_are_left_out() -> None:
    short, long = "Two?", "Two? " * 30
    _, tokenizer = make_renderer(CHATML)
    prompt = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    num_tokens = len(tokenizer(prompt)["input_ids"])
    rows = [chat(user(long)), chat(user(short)), {"prompt": long}]

    rendered, answerer, _ = regenerate(rows, {"Two?": "Zwei.<|im_end|>"}, max_tokens=num_tokens + 1)

    assert answerer.calls == [[prompt]]
    assert [[left.reason for left in one.left_out] for one in rendered] == [
        [PROMPT_TOO_LONG], [], [PROMPT_TOO_LONG],
    ]  # fmt: skip
    assert [one.num_turns for one in rendered] == [1, 1, 1]
    # One token of the answer fits.
    (row,) = rendered[1].rows
    assert len(row.input_ids) == num_tokens + 1
    assert row.loss_mask.tolist() == [False] * num_tokens + [True]
    assert rendered[1].num_cut == 1

    nothing, answerer, _ = regenerate([rows[1]], {"": ""}, max_tokens=num_tokens)
    assert answerer.calls == []
    assert nothing[0].left_out[0].reason == PROMPT_TOO_LONG


def test_a_conversation_that_grows_too_long_keeps_the_turns_before() -> None:
    row = chat(user("Two?"), assistant("a"), user("Three? " * 40))
    replies = {"Two?": "Zwei.<|im_end|>", "Three?": "Drei.<|im_end|>"}

    (rendered,), answerer, tokenizer = regenerate([row], replies, max_tokens=100)

    assert len(answerer.calls) == 1
    assert marked(tokenizer, rendered)[0].endswith("⟦Zwei.<|im_end|>⟧")
    (left,) = rendered.left_out
    assert (left.name, left.reason) == ("000000-turn2", PROMPT_TOO_LONG)
    assert rendered.num_turns == 2


def test_what_the_template_rejects_is_left_out_with_its_sentence() -> None:
    rows = [
        chat({"role": "system", "content": "Think."}, user("Two?")),
        chat(user("Two?")),
    ]

    rendered, answerer, _ = regenerate(rows, {"Two?": "Zwei.<|im_end|>"}, family=NO_SYSTEM)

    (left,) = rendered[0].left_out
    assert left.reason == "template error: System role not supported"
    assert left.text == "message 0 (system): Think."
    assert rendered[0].rows == ()
    assert len(answerer.calls[0]) == 1
    assert len(rendered[1].rows) == 1


def test_a_base_model_continues_prompts() -> None:
    (rendered,), answerer, tokenizer = regenerate(
        [{"prompt": "Two and"}], {"and": " three.</s>"}, family=BASE
    )

    assert answerer.calls == [["Two and"]]
    assert marked(tokenizer, rendered) == ["Two and⟦ three.</s>⟧"]


def test_an_answer_without_tokens_is_left_out() -> None:
    (rendered,), _, _ = regenerate([chat(user("Two?"))], {"Two?": CUT})

    assert rendered.rows == ()
    assert len(rendered.left_out) == 1
    assert rendered.num_turns == 1


def test_seeds_are_of_the_row_and_the_turn() -> None:
    rows = [chat(user("Two?"), assistant("a"), user("Three?")), chat(user("Two?"))]
    replies = {"Two?": "Zwei.<|im_end|>", "Three?": "Drei.<|im_end|>"}

    _, together, _ = regenerate(rows, replies)
    _, later, _ = regenerate(rows[1:], replies, first_index=1)

    assert together.seeds == [seed_of(3, 0, 0), seed_of(3, 1, 0), seed_of(3, 0, 1)]
    assert later.seeds == [seed_of(3, 1, 0)]


def test_seeds_differ_and_fit_every_engine() -> None:
    found = {seed_of(s, i, t) for s in (0, 1, 11) for i in (0, 1, 11) for t in (0, 1, 11)}

    assert len(found) == 27
    assert all(0 <= seed < 2**63 for seed in found)


def test_a_script_asks_after_questions_and_results_only() -> None:
    system = {"role": "system", "content": "Think."}
    messages = [
        *(system, assistant("Hello."), user("Two?"), user("Or three?"), assistant("a")),
        *(assistant("b"), user("And?"), assistant("", tool_calls=[CALL])),
        *({"role": "tool", "content": "5"}, assistant("c")),
    ]

    asked = play(messages)

    assert [[m["content"] for m in history] for history in asked] == [
        ["Think.", "Two?", "Or three?"],
        ["Think.", "Two?", "Or three?", "reply 1", "And?", "", "5"],
    ]


def test_a_script_without_a_question_ends_at_once() -> None:
    assert play([{"role": "system", "content": "Think."}, assistant("Hello.")]) == []


def play(messages: list[Message]) -> list[list[Message]]:
    """The histories that a script has answered."""
    script, asked = write_script(messages), []
    history = next(script, None)
    while history is not None:
        asked.append(history)
        try:
            history = script.send(assistant(f"reply {len(asked)}"))
        except StopIteration:
            history = None
    return asked


def test_an_answer_of_harmony_is_read_by_channel() -> None:
    tokenizer = make_tokenizer(HARMONY)
    text = (
        "<|channel|>analysis<|message|>2 + 3 <|end|><|start|>assistant"
        "<|channel|>final<|message|> Five."
    )

    message = read_answer(tokenizer, tokenizer(text)["input_ids"])

    assert message == {"role": "assistant", "content": "Five.", "thinking": "2 + 3"}


def test_an_answer_is_read_without_its_end_token() -> None:
    rows = [chat(user("Two?"), assistant("-"), user("Three?"))]
    replies = {"Two?": " Zwei.\n<|im_end|>", "Three?": "Drei.<|im_end|>"}

    _, answerer, _ = regenerate(rows, replies)

    assert answerer.calls[1][0].count("<|im_start|>assistant\nZwei.<|im_end|>") == 1


def test_thoughts_between_special_tokens_are_left_out_of_later_prompts() -> None:
    # Without the tokens around them, the template could not tell them from the answer.
    rows = [chat(user("Two?"), assistant("-"), user("Three?"))]
    replies = {
        "Two?": "add</think>Zwei.</s>",
        "Three?": "add</think>Drei.</s>",
    }

    (rendered,), answerer, tokenizer = regenerate(rows, replies, family=DEEPSEEK_R1)

    ids = tokenizer("<think>add</think>")["input_ids"]
    assert "think" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert answerer.calls[1] == ["<s><U>Two?<A>Zwei.</s><U>Three?<A><think>\n"]
    assert len(rendered.rows) == 2


def test_sources_with_answers_of_their_own_are_rendered_as_given() -> None:
    row = {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]}

    (rendered,), answerer, _ = regenerate([row], {"": ""})

    assert answerer.calls == []
    assert rendered.rows[0].loss_mask.tolist() == [False, False, True, True]
    assert isinstance(parse_row(chat(user("a")), 0), Conversation)

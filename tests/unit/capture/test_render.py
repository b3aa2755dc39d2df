"""Masks of conversations, against texts that are marked by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators_cli.core.capture.render import EngineTurn
from speculators_cli.core.capture.rendered import (
    EMPTY_ANSWER,
    NO_ANSWER,
    NO_BOUNDARY,
    LeftOut,
    RenderCounts,
    check_left_out,
    too_long,
)
from speculators_cli.core.conversations.chat_template import RenderError
from speculators_cli.core.conversations.prompts import (
    Conversation,
    GivenTokens,
    Message,
    RawPrompt,
    Source,
    Text,
    parse_row,
)
from speculators_cli.core.errors import DataError, SettingsError
from tests.unit.capture.chat_templates import (
    BASE,
    CHATML,
    DEEPSEEK_R1,
    GEMMA,
    GENERATION,
    HARMONY,
    LLAMA_3,
    MISTRAL,
    PLAIN,
    QWEN_3,
    Family,
    assistant,
    make_renderer,
    make_tokenizer,
    marked,
    names,
    user,
)

PLAIN_CHAT = (user("Two and three?"), assistant("Five."), user("And one?"), assistant("Six."))
THOUGHTS = {"role": "assistant", "content": "Five.", "reasoning_content": "2 + 3"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Two and three?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "Five."},
]


def parse(*messages: Message) -> Conversation:
    """A conversation as the reader of the input makes it."""
    source = parse_row({"messages": list(messages)}, 7)
    assert isinstance(source, Conversation)
    return source


def rows(family: Family, source: Source, **more: bool) -> list[str]:
    renderer, tokenizer = make_renderer(family, thinking=more.get("thinking"))
    return marked(tokenizer, renderer.rows_of(source))


def test_llama_3_has_all_answers_in_one_row() -> None:
    system = {"role": "system", "content": "Think."}

    text = rows(LLAMA_3, parse(system, *PLAIN_CHAT))

    assert text == [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nThink.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo and three?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Five.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd one?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Six.<|eot_id|>⟧"
    ]


def test_tool_calls_are_supervised_and_their_results_are_not() -> None:
    text = rows(LLAMA_3, parse(*TOOL_CHAT))

    assert text == [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTwo and three?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 2, "b": 3}}<|eot_id|>⟧'
        "<|start_header_id|>tool<|end_header_id|>\n\n5<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Five.<|eot_id|>⟧"
    ]


def test_what_a_template_puts_after_the_end_token_is_not_supervised() -> None:
    assert rows(CHATML, parse(*PLAIN_CHAT)) == [
        "<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n⟦Five.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd one?<|im_end|>\n<|im_start|>assistant\n⟦Six.<|im_end|>⟧"
    ]


@pytest.mark.parametrize("thinking", [None, True, False])
def test_an_empty_block_of_thoughts_is_not_supervised(thinking: bool | None) -> None:
    renderer, tokenizer = make_renderer(QWEN_3, thinking=thinking)

    rendered = renderer.rows_of(parse(*PLAIN_CHAT))

    # The history lacks the block, so each answer has a row with what the server would see.
    assert names(rendered) == ["000007-turn1", "000007-turn2"]
    assert marked(tokenizer, rendered) == [
        "<|im_start|>user\nTwo and three?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Five.<|im_end|>⟧",
        "<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\nFive.<|im_end|>\n"
        "<|im_start|>user\nAnd one?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Six.<|im_end|>⟧",
    ]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_supervised_under_each_of_their_names(key: str, thinking: bool | None) -> None:
    answer = {"role": "assistant", "content": "Five.", key: "2 + 3"}
    renderer, tokenizer = make_renderer(QWEN_3, thinking=thinking)

    rendered = renderer.rows_of(parse(user("Two and three?"), answer))

    assert names(rendered) == ["000007"]
    assert marked(tokenizer, rendered) == [
        "<|im_start|>user\nTwo and three?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n2 + 3\n</think>\n\nFive.<|im_end|>⟧"
    ]


def test_thoughts_before_a_tool_call_are_kept_while_no_question_follows() -> None:
    call = {**TOOL_CHAT[1], "reasoning_content": "add"}
    last = {**TOOL_CHAT[3], "reasoning_content": "5"}

    text = rows(QWEN_3, parse(TOOL_CHAT[0], call, TOOL_CHAT[2], last))

    assert text == [
        "<|im_start|>user\nTwo and three?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nadd\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n5<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n5\n</think>\n\nFive.<|im_end|>⟧"
    ]


def test_tools_of_a_row_are_rendered() -> None:
    row = {"messages": list(PLAIN_CHAT[:2]), "tools": '[{"name": "add"}]'}

    text = rows(QWEN_3, parse_row(row, 0), thinking=False)

    assert text == [
        '<|im_start|>system\n[{"name": "add"}]<|im_end|>\n'
        "<|im_start|>user\nTwo and three?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Five.<|im_end|>⟧"
    ]


def test_a_thought_that_only_the_generation_prompt_opens_is_left_out() -> None:
    answer = assistant("<think>\n2 + 3</think>Five.")

    text = rows(DEEPSEEK_R1, parse(user("Two and three?"), answer, *PLAIN_CHAT[2:]))

    assert text == ["<s><U>Two and three?<A>⟦Five.</s>⟧<U>And one?<A>⟦Six.</s>⟧"]


def test_templates_that_join_the_arguments_of_a_call_as_a_string_get_one() -> None:
    renderer, tokenizer = make_renderer(DEEPSEEK_R1)
    chat = parse(*TOOL_CHAT[:2])

    ids = renderer.prompts.render([*chat.messages, user("And?")])

    assert tokenizer.decode(ids) == (
        '<s><U>Two and three?<A></s>add {"a": 2, "b": 3}<U>And?<A><think>\n'
    )


def test_harmony_has_channels_and_its_last_end_token_supervised() -> None:
    text = rows(HARMONY, parse(user("Two and three?"), THOUGHTS, *PLAIN_CHAT[2:]))

    assert text == [
        "<|start|>user<|message|>Two and three?<|end|><|start|>assistant"
        "⟦<|channel|>analysis<|message|>2 + 3<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Five.<|return|>⟧",
        "<|start|>user<|message|>Two and three?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Five.<|end|>"
        "<|start|>user<|message|>And one?<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>Six.<|return|>⟧",
    ]


def test_a_tool_call_of_harmony_ends_with_its_own_token() -> None:
    text = rows(HARMONY, parse(*TOOL_CHAT))

    assert text == [
        "<|start|>user<|message|>Two and three?<|end|><|start|>assistant"
        '⟦<|channel|>commentary to=add<|message|>{"a": 2, "b": 3}<|call|>⟧'
        "<|start|>tool<|message|>5<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>Five.<|return|>⟧"
    ]


def test_gemma_has_a_role_of_its_own_for_answers() -> None:
    assert rows(GEMMA, parse(*PLAIN_CHAT)) == [
        "<bos><start_of_turn>user\nTwo and three?<end_of_turn>\n"
        "<start_of_turn>model\n⟦Five.<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd one?<end_of_turn>\n"
        "<start_of_turn>model\n⟦Six.<end_of_turn>⟧"
    ]


def test_mistral_has_no_generation_prompt() -> None:
    assert rows(MISTRAL, parse(*PLAIN_CHAT)) == [
        "<s>[INST] Two and three? [/INST]⟦ Five.</s>⟧[INST] And one? [/INST]⟦ Six.</s>⟧"
    ]


def test_tokens_across_the_boundary_belong_to_the_answer() -> None:
    renderer, tokenizer = make_renderer(PLAIN)

    rendered = renderer.rows_of(parse(*PLAIN_CHAT[:2]))

    # The tokenizer joins the space of the generation prompt with the word after it.
    assert marked(tokenizer, rendered) == ["user: Two and three?\nassistant:⟦ Five.⟧"]
    assert rendered.num_without_end == 1


def test_answers_without_end_token_have_a_row_each() -> None:
    renderer, tokenizer = make_renderer(PLAIN)

    rendered = renderer.rows_of(parse(*PLAIN_CHAT))

    assert marked(tokenizer, rendered) == [
        "user: Two and three?\nassistant:⟦ Five.⟧",
        "user: Two and three?\nassistant: Five.\nuser: And one?\nassistant:⟦ Six.⟧",
    ]


def test_an_answer_without_a_certain_boundary_is_left_out() -> None:
    # The template changes the question once it is answered.
    template = """
{%- for message in messages %}
    {{- message.content + ('!' if loop.last and message.role == 'user' else '</s>') }}
{%- endfor %}"""
    renderer, _ = make_renderer(Family(template, ("</s>",)))

    rendered = renderer.rows_of(parse(*PLAIN_CHAT[:2]))

    assert rendered.rows == ()
    assert rendered.left_out == (LeftOut("000007", NO_BOUNDARY, "Two and three?</s>Five.</s>"),)


def test_an_answer_that_the_template_drops_is_left_out() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}<U>{% endfor %}"
    renderer, _ = make_renderer(Family(template, ("</s>",)))

    rendered = renderer.rows_of(parse(*PLAIN_CHAT[:2]))

    assert rendered.rows == ()
    assert [left.reason for left in rendered.left_out] == [EMPTY_ANSWER]


def test_an_answer_of_only_an_end_token_is_left_out() -> None:
    # The template does not render tool calls as part of the answer.
    template = DEEPSEEK_R1.template.replace("message.tool_calls or []", "[]")
    renderer, _ = make_renderer(Family(template, ("</s>",), "<s>"))

    rendered = renderer.rows_of(parse(*TOOL_CHAT[:2]))

    text = "<s><U>Two and three?<A></s>"
    assert rendered.left_out == (LeftOut("000007", EMPTY_ANSWER, text),)


def test_an_answer_before_any_question_is_not_supervised() -> None:
    renderer, tokenizer = make_renderer(CHATML)

    rendered = renderer.rows_of(parse(assistant("Hello."), *PLAIN_CHAT[:2]))

    assert marked(tokenizer, rendered) == [
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n⟦Five.<|im_end|>⟧"
    ]
    assert (rendered.num_turns, rendered.left_out) == (1, ())


def test_the_sentence_of_a_template_is_reported_with_the_message() -> None:
    renderer, _ = make_renderer(GEMMA)
    system = {"role": "system", "content": "Think."}

    rendered = renderer.rows_of(parse(system, *PLAIN_CHAT[:2]))

    reason = "template error: System role not supported"
    assert rendered.left_out == (LeftOut("000007", reason, "message 0 (system): Think."),)
    with pytest.raises(RenderError, match="System role not supported") as error:
        renderer.prompts.render([system, user("Two and three?")])
    assert error.value.index == 0


def test_turns_before_the_one_that_a_template_rejects_are_kept() -> None:
    renderer, tokenizer = make_renderer(MISTRAL)

    rendered = renderer.rows_of(parse(*PLAIN_CHAT[:2], user("One?"), user("Two?"), PLAIN_CHAT[3]))

    assert marked(tokenizer, rendered) == ["<s>[INST] Two and three? [/INST]⟦ Five.</s>⟧"]
    reason = "template error: Roles must alternate"
    assert rendered.left_out == (LeftOut("000007-turn2", reason, "message 3 (user): Two?"),)


def test_generation_blocks_that_agree_are_accepted() -> None:
    assert rows(GENERATION, parse(*PLAIN_CHAT)) == rows(CHATML, parse(*PLAIN_CHAT))


@pytest.mark.parametrize(
    "block",
    [
        "{%- generation %}{{- message.content }}{% endgeneration %}{{- '<|im_end|>' }}",
        "{%- generation %}{{- message.content + '<|im_end|>\n' }}{% endgeneration %}",
    ],
    ids=["without the end token", "with the newline"],
)
def test_generation_blocks_may_end_at_another_place(block: str) -> None:
    old = "{%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    assert old in GENERATION.template
    renderer, _ = make_renderer(Family(GENERATION.template.replace(old, block), ("<|im_end|>",)))

    assert len(renderer.rows_of(parse(*PLAIN_CHAT[:2])).rows) == 1


def test_generation_blocks_that_disagree_are_an_error_with_both_texts() -> None:
    swapped = GENERATION.template.replace("message.role == 'assistant'", "message.role == 'user'")
    renderer, _ = make_renderer(Family(swapped, ("<|im_end|>",)))

    with pytest.raises(DataError, match="marks other tokens of `000007`") as error:
        renderer.rows_of(parse(*PLAIN_CHAT))

    assert error.value.message.endswith(
        "  template: And one?\n  compared: Five.<|im_end|>Six.<|im_end|>"
    )


def test_only_the_first_rows_are_compared_with_generation_blocks() -> None:
    swapped = GENERATION.template.replace("message.role == 'assistant'", "message.role == 'user'")
    renderer, _ = make_renderer(Family(swapped, ("<|im_end|>",)), num_checked=0)

    assert len(renderer.rows_of(parse(*PLAIN_CHAT)).rows) == 1


def test_given_tokens_are_taken_as_they_are_up_to_the_last_supervised_one() -> None:
    renderer, _ = make_renderer(CHATML)
    ids, mask = np.arange(6, dtype=np.int32), np.array([0, 1, 0, 1, 0, 0], np.bool_)

    (row,) = renderer.rows_of(GivenTokens(3, ids, mask)).rows

    assert (row.name, row.input_ids.tolist()) == ("000003", [0, 1, 2, 3])
    assert row.loss_mask.tolist() == [False, True, False, True]


def test_rows_are_cut_at_the_limit_and_counted() -> None:
    renderer, tokenizer = make_renderer(LLAMA_3)
    whole = renderer.rows_of(parse(*PLAIN_CHAT))
    num_tokens = len(whole.rows[0].input_ids)
    num_first = np.flatnonzero(whole.rows[0].loss_mask)[0]

    counts, texts = [], []
    for max_tokens in (num_tokens, num_tokens - 1, num_first + 1, num_first):
        renderer, tokenizer = make_renderer(LLAMA_3, max_tokens=max_tokens)
        rendered = renderer.rows_of(parse(*PLAIN_CHAT))
        counts.append((len(rendered.rows), rendered.num_cut, len(rendered.left_out)))
        texts.append(marked(tokenizer, rendered))

    assert counts == [(1, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 1)]
    assert texts[1][0].endswith("⟦Six.⟧")
    assert texts[2][0].count("⟦") == 1
    assert rendered.left_out[0].reason == f"no supervised token within {num_first} tokens"


def test_a_base_model_takes_prompts_and_texts_but_no_conversations() -> None:
    renderer, _ = make_renderer(BASE)

    with pytest.raises(SettingsError, match="no chat template"):
        renderer.rows_of(parse(*PLAIN_CHAT))
    rendered = renderer.rows_of(RawPrompt(1, "Paris"))

    assert rendered.left_out == (LeftOut("000001", NO_ANSWER, "Paris"),)


@pytest.mark.parametrize(
    ("added", "supervised"),
    [(("", ""), "⟦Paris⟧"), (("<s>", ""), "<s>⟦Paris⟧"), (("<s>", "</s>"), "<s>⟦Paris</s>⟧")],
    ids=["nothing", "a begin token", "begin and end tokens"],
)
def test_a_text_has_the_special_tokens_that_the_tokenizer_adds(
    added: tuple[str, str], supervised: str
) -> None:
    begin, end = added
    renderer, tokenizer = make_renderer(BASE, make_tokenizer(BASE, begin=begin, end=end))

    rendered = renderer.rows_of(Text(0, "Paris"))

    assert marked(tokenizer, rendered) == [supervised]
    assert tokenizer.decode(renderer.prompts.render_raw(RawPrompt(0, "Paris"))) == f"{begin}Paris"


def test_a_prompt_is_a_user_message_where_there_is_a_chat_template() -> None:
    renderer, tokenizer = make_renderer(LLAMA_3)

    text = tokenizer.decode(renderer.prompts.render_raw(RawPrompt(0, "Two and three?")))

    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTwo and three?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_prompts_have_the_ids_of_transformers() -> None:
    renderer, tokenizer = make_renderer(QWEN_3, thinking=False)
    messages: list[Any] = [user("Zürich? 🙂"), assistant("Ja\n\n\n nein"), user("  And?")]

    ids = renderer.prompts.render(messages)

    assert ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )


def test_answers_of_an_engine_share_a_row_while_each_prompt_begins_with_the_last() -> None:
    renderer, _ = make_renderer(CHATML)
    first = EngineTurn([1, 2, 3], [4, 5], is_truncated=False)

    one = renderer.join(4, [first, EngineTurn([1, 2, 3, 4, 5, 6], [7], is_truncated=True)])
    two = renderer.join(4, [first, EngineTurn([1, 2, 3, 9, 5, 6], [7], is_truncated=False)])

    assert names(one) == ["000004"]
    assert one.rows[0].input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert one.rows[0].loss_mask.tolist() == [False] * 3 + [True] * 2 + [False, True]
    assert (one.num_turns, one.num_without_end) == (2, 1)
    assert names(two) == ["000004-turn1", "000004-turn2"]
    assert two.rows[1].input_ids.tolist() == [1, 2, 3, 9, 5, 6, 7]
    assert two.rows[1].loss_mask.tolist() == [False] * 6 + [True]


def test_an_empty_answer_of_an_engine_is_left_out() -> None:
    renderer, _ = make_renderer(CHATML)

    rendered = renderer.join(4, [EngineTurn([1, 2], [], is_truncated=True)])

    assert rendered.left_out == (LeftOut("000004", EMPTY_ANSWER),)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused() -> None:
    renderer, _ = make_renderer(CHATML)
    renderer._encoder._vocab_size = 20

    with pytest.raises(SettingsError, match="the verifier has embeddings of 20 tokens"):
        renderer.rows_of(parse(*PLAIN_CHAT))


def test_counts_add_up() -> None:
    renderer, _ = make_renderer(GEMMA)
    system = {"role": "system", "content": "Think."}
    sources: list[Source] = [
        parse(*PLAIN_CHAT),
        parse(system, *PLAIN_CHAT[:2]),
        RawPrompt(1, "Paris"),
    ]

    rendered = list(renderer.rows_of_all(sources))
    counts = RenderCounts.total(RenderCounts.of(x) for x in rendered)

    (row,) = rendered[0].rows
    assert RenderCounts.from_json(counts.to_json()) == counts
    assert counts == RenderCounts(
        num_sources=3,
        num_turns=4,
        num_rows=1,
        num_tokens=len(row.input_ids),
        num_supervised_tokens=int(row.loss_mask.sum()),
        left_out={NO_ANSWER: 1, "template error: System role not supported": 1},
    )


def test_few_answers_may_be_left_out() -> None:
    counts = {"num_sources": 100, "num_turns": 100, "num_supervised_tokens": 9}
    example = LeftOut("000003", NO_BOUNDARY, "some text")

    check_left_out(RenderCounts(**counts, left_out={NO_BOUNDARY: 5}), [example])
    check_left_out(RenderCounts(**counts, left_out={too_long(10): 90}), [])
    with pytest.raises(DataError, match=r"6 of 100 answers were left out \(6.0%\)") as error:
        check_left_out(RenderCounts(**counts, left_out={NO_BOUNDARY: 6}), [example])

    assert "000003: no certain boundary between prompt and answer\n    some text" in str(
        error.value
    )


def test_an_input_without_a_supervised_token_is_refused() -> None:
    counts = RenderCounts(num_sources=3, num_turns=3, left_out={NO_ANSWER: 3})

    with pytest.raises(DataError, match="No token of 3 rows is supervised: no answer") as error:
        check_left_out(counts, [LeftOut("000000", NO_ANSWER, "Paris")])

    assert error.value.hint == "Pass `--regenerate` for answers of the verifier"


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=20)
CHATS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)
RENDERER = make_renderer(CHATML)


def to_conversation(chat: list[tuple[str, str]]) -> Conversation:
    return parse(*(m for question, answer in chat for m in (user(question), assistant(answer))))


@settings(max_examples=60, deadline=None)
@given(CHATS)
def test_supervised_text_is_the_answers_with_their_end_tokens(chat: list[tuple[str, str]]) -> None:
    renderer, tokenizer = RENDERER

    rendered = renderer.rows_of(to_conversation(chat))

    (row,) = rendered.rows
    text = str(tokenizer.decode(row.input_ids[row.loss_mask].tolist()))
    expected = "".join(f"{answer}<|im_end|>" for _, answer in chat)
    # Newlines at the start of an answer may share a token with that of the generation prompt.
    assert text.replace("\n", "") == expected.replace("\n", "")
    assert rendered.left_out == ()


FAMILIES = {
    "llama 3": LLAMA_3,
    "chatml": CHATML,
    "qwen 3": QWEN_3,
    "deepseek r1": DEEPSEEK_R1,
    "harmony": HARMONY,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "plain": PLAIN,
}
BOTH = {name: (make_renderer(f), make_renderer(f)[0]) for name, f in FAMILIES.items()}
for _, plain in BOTH.values():
    plain._finder._split_token = None  # prompts are encoded whole


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(CHATS)
def test_prompts_need_not_be_encoded_whole(name: str, chat: list[tuple[str, str]]) -> None:
    (renderer, tokenizer), whole = BOTH[name]
    conversation = to_conversation(chat)

    rendered, expected = renderer.rows_of(conversation), whole.rows_of(conversation)

    assert marked(tokenizer, rendered) == marked(tokenizer, expected)
    assert names(rendered) == names(expected)
    assert rendered.left_out == expected.left_out
    assert len(rendered.rows) + len(rendered.left_out) > 0


def test_texts_to_encode_grow_with_the_conversation_not_with_its_square() -> None:
    renderer, _ = make_renderer(LLAMA_3)
    encoded: list[str] = []
    encode = renderer._encoder.encode
    renderer._encoder.encode = lambda texts: encoded.extend(texts) or encode(texts)  # type: ignore[func-returns-value, method-assign]

    (row,) = renderer.rows_of(to_conversation([("Two and three?", "Five.")] * 50)).rows

    # The conversation itself, and the header of each answer.
    header = "<|end_header_id|>\n\n"
    assert encoded[1:] == [header] * 50
    assert row.loss_mask.sum() > 100

"""Chat templates that behave as those of well-known families, and a tokenizer for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from speculators_cli.core.capture.render import Renderer
from speculators_cli.core.capture.rendered import Rendered
from speculators_cli.core.capture.show_masks import mark_row
from speculators_cli.core.conversations.prompts import Message

SPECIAL = (
    *("<s>", "</s>", "<bos>", "<eos>", "<think>", "</think>", "[INST]", "[/INST]"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<start_of_turn>", "<end_of_turn>", "<U>", "<A>"),
)
TRAINED_ON = (
    "What is the capital of France? The capital of France is Paris.",
    "assistant: Five. user: Six. assistant: Five. user: Six.",
    "user assistant system tool\n\nThe sum of two and three is five. Think first, then answer.\n",
    '{"name": "add", "arguments": {"a": 2, "b": 3}}',
)
VOCAB_SIZE = 512


@dataclass(frozen=True)
class Family:
    """A chat template with its end tokens."""

    template: str
    end_tokens: tuple[str, ...]
    bos_token: str | None = None


# Each message with its header; no state.
LLAMA_3 = Family(
    template="""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- {'name': call.name, 'parameters': call.arguments} | tojson }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    end_tokens=("<|endoftext|>", "<|eot_id|>"),
    bos_token="<|begin_of_text|>",
)

CHATML = Family(
    template="""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    end_tokens=("<|im_end|>",),
)

# Thoughts only after the last question, there also if they are empty.
QWEN_3 = Family(
    template="""
{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set last.question = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = message.reasoning_content | default('') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.question and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    end_tokens=("<|im_end|>", "<|endoftext|>"),
)

# The generation prompt opens a thought; thoughts are removed from all messages.
DEEPSEEK_R1 = Family(
    template="""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<U>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<A>' + message.content.split('</think>')[-1] + '</s>' }}
        {%- for call in message.tool_calls or [] %}
            {{- call.function.name + ' ' + call.function.arguments }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<A><think>\\n' }}
{%- endif %}""",
    end_tokens=("</s>",),
    bos_token="<s>",
)

# Channels. The end token of an answer is another one in the history, which lacks the thoughts.
HARMONY = Family(
    template="""
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|channel|>commentary to=' + call.name + '<|message|>' }}
        {{- call.arguments | tojson + '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant' }}
        {%- if loop.last and message.thinking %}
            {{- '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}
        {%- endif %}
        {{- '<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last else '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}""",
    end_tokens=("<|return|>", "<|call|>"),
)

GEMMA = Family(
    template="""
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}""",
    end_tokens=("<eos>", "<end_of_turn>"),
    bos_token="<bos>",
)

# Answers follow a space; no generation prompt; roles must alternate.
MISTRAL = Family(
    template="""
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + '</s>' }}
    {%- endif %}
{%- endfor %}""",
    end_tokens=("</s>",),
    bos_token="<s>",
)

# Headers without special tokens: nothing separates the prompt from the answer.
PLAIN = Family(
    template="""
{%- for message in messages %}
    {{- message.role + ': ' + message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant: ' }}
{%- endif %}""",
    end_tokens=("</s>",),
)

GENERATION = Family(
    template="""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    end_tokens=("<|im_end|>",),
)


BASE = Family(template="", end_tokens=("</s>",))


def make_tokenizer(family: Family, *, begin: str = "", end: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts special tokens around texts; its words have several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINED_ON * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}".strip(),
        special_tokens=[(token, SPECIAL.index(token)) for token in (begin, end) if token],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=family.template, bos_token=family.bos_token
    )


def make_renderer(
    family: Family,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    thinking: bool | None = None,
    max_tokens: int = 4096,
    **more: Any,
) -> tuple[Renderer, PreTrainedTokenizerFast]:
    """A renderer, and its tokenizer."""
    tokenizer = tokenizer or make_tokenizer(family)
    renderer = Renderer(
        tokenizer,
        end_ids=[tokenizer.get_vocab()[token] for token in family.end_tokens],
        thinking=thinking,
        max_tokens=max_tokens,
        vocab_size=VOCAB_SIZE,
        **more,
    )
    return renderer, tokenizer


def marked(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> list[str]:
    """The text of each row, with the supervised parts in brackets."""
    return [
        "".join(f"⟦{text}⟧" if is_marked else text for text, is_marked in mark_row(tokenizer, row))
        for row in rendered.rows
    ]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def names(rendered: Rendered) -> Sequence[str]:
    return [row.name for row in rendered.rows]

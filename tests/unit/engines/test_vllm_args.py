"""Flags of vLLM that are passed through, and those that are not."""

import pytest

from speculators_cli.core.engines.vllm_args import parse_vllm_args
from speculators_cli.core.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ()),
        ("--max-model-len 8k -pp=2", ("--max-model-len", "8k", "-pp=2")),
        ("""--hf-overrides '{"a": 1}'""", ("--hf-overrides", '{"a": 1}')),
        ("--tokenizer org/name", ("--tokenizer", "org/name")),
    ],
)
def test_flags_are_split_as_by_a_shell(text: str, words: tuple[str, ...]) -> None:
    assert parse_vllm_args(text) == words


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("--max-model-len 512 --dtype float16", "Pass `--dtype` instead"),
        ("--tensor_parallel_size=2", "Pass `--tensor-parallel-size` instead"),
        ("-tp 2", "Pass `--tensor-parallel-size` instead"),
        ("--model x", "Pass `--verifier-name-or-path` instead"),
        ("--speculative-config.method eagle", "Remove it from `--vllm-args`"),
        ("--no-enable-prefix-caching", "Remove it from `--vllm-args`"),
        ("--data-parallel-size-local 2", "Remove it from `--vllm-args`"),
    ],
)
def test_what_the_command_sets_is_refused(text: str, hint: str) -> None:
    with pytest.raises(SettingsError, match="is set by this command") as raised:
        parse_vllm_args(text)

    assert raised.value.hint == hint


@pytest.mark.parametrize("text", ["max-model-len 512", "--hf-overrides '{"])
def test_what_is_not_flags_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="`--vllm-args`"):
        parse_vllm_args(text)


def test_the_hint_has_the_flags_of_the_command() -> None:
    names = {"--tensor-parallel-size": "--capture-gpus"}

    with pytest.raises(SettingsError) as raised:
        parse_vllm_args("-tp 2", names)
    with pytest.raises(SettingsError) as other:
        parse_vllm_args("--model x", names)

    assert raised.value.hint == "Pass `--capture-gpus` instead"
    assert other.value.hint == "Pass `--verifier-name-or-path` instead"

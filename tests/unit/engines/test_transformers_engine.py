"""The transformers engine against one forward per document, for every kind of family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from speculators_cli.core.engines import packed_attention, transformers_engine
from speculators_cli.core.engines.engine import CapturedStates, Packed, Prompt, Sampling
from speculators_cli.core.engines.packed_attention import Packing
from speculators_cli.core.engines.transformers_engine import TransformersEngine, load_model
from speculators_cli.core.errors import SettingsError
from tests.tiny_families import (
    ALONE,
    END_ID,
    FAMILIES,
    NUM_LAYERS,
    PACKED,
    SIZES,
    VOCAB,
    build_model,
)

# transformers says so when it computes without the kernels of a family.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")

LAYER_IDS = (0, 1, 3, NUM_LAYERS)
LENGTHS = (5, 17, 1, 9)
# Of the largest state: sums of tens of float32 terms in another order, over four layers.
TOLERANCE = 1e-5
GREEDY = Sampling(max_new_tokens=7)


@cache
def engine_of(name: str) -> TransformersEngine:
    """An engine with a model of its own, which packs as on a GPU; tests leave it as it is."""
    return TransformersEngine(
        build_model(name),
        LAYER_IDS,
        end_ids=frozenset({END_ID}),
        name="the-verifier",
        packs_documents=True,
    )


@cache
def model_of(name: str) -> Any:
    """The same model, which no engine has changed."""
    return build_model(name)


def pack(lengths: tuple[int, ...] = LENGTHS, rows: Tensor | None = None) -> Packed:
    """Random documents, with last states of all tokens unless `rows` are given."""
    rng = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB, (sum(lengths),), generator=rng)
    return Packed(input_ids, lengths, torch.arange(sum(lengths)) if rows is None else rows)


@contextmanager
def inputs_of_norm(model: Any) -> Iterator[list[Tensor]]:
    """Collect what passes into the final norm."""
    found: list[Tensor] = []
    names = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
    decoder = getattr(model.get_decoder(), "model", model.get_decoder())
    norm = next(getattr(decoder, name) for name in names if hasattr(decoder, name))
    hook = norm.register_forward_pre_hook(lambda _, given: found.append(given[0][0]))
    yield found
    hook.remove()


@torch.no_grad()
def capture_alone(model: Any, packed: Packed) -> CapturedStates:
    """transformers' own hidden states, of one forward per document."""
    aux, last = [], []
    for start, end in pairwise([0, *accumulate(packed.lengths)]):
        with inputs_of_norm(model) as before_norm:
            ids = packed.input_ids[start:end][None]
            out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        # transformers' last entry is normed, which that of layer n is not.
        own = [*out.hidden_states[:NUM_LAYERS], before_norm[0][None]]
        assert len(out.hidden_states) == NUM_LAYERS + 1
        aux.append(torch.cat([own[layer_id][0] for layer_id in LAYER_IDS], dim=-1))
        last.append(before_norm[0])
    return CapturedStates(torch.cat(aux), torch.cat(last)[packed.rows])


def assert_same_states(found: CapturedStates, expected: CapturedStates) -> None:
    for own, exact in ((found.aux, expected.aux), (found.last, expected.last)):
        scale = float(exact.abs().max())
        assert scale > 0
        torch.testing.assert_close(own, exact, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_have_the_states_of_one_forward_each(name: str) -> None:
    packed = pack()

    found = engine_of(name).capture(packed)

    assert engine_of(name).is_packed == (name in PACKED)
    assert found.aux.shape == (sum(LENGTHS), len(LAYER_IDS) * found.last.shape[1])
    assert_same_states(found, capture_alone(model_of(name), packed))


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "qwen3-next"])
def test_last_states_are_of_the_rows_that_are_asked_for(name: str) -> None:
    # None of the first document, the only token of the third, the last one of all.
    rows = torch.tensor([5, 11, 21, 22, 30, 31])
    everything = engine_of(name).capture(pack())

    found = engine_of(name).capture(pack(rows=rows))

    assert torch.equal(found.last, everything.last[rows])
    assert torch.equal(found.aux, everything.aux)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_document_sees_another(name: str) -> None:
    packed = pack()
    changed = Packed(packed.input_ids.clone(), packed.lengths, packed.rows)
    own = slice(5, 22)  # the second document
    changed.input_ids[own] = (packed.input_ids[own] - 2) % (VOCAB - 3) + 3

    before, after = (engine_of(name).capture(x).aux for x in (packed, changed))

    is_same = torch.isclose(before, after, rtol=0, atol=TOLERANCE * float(before.abs().max()))
    is_other = torch.ones(len(before), dtype=torch.bool)
    is_other[own] = False
    assert not is_same[own].all(-1).any()
    assert is_same[is_other].all()


def test_on_a_cpu_no_bit_of_a_document_depends_on_the_others() -> None:
    engine = TransformersEngine(
        build_model("llama"), LAYER_IDS, end_ids=frozenset({END_ID}), name="it"
    )
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 30, (n,), generator=generator) for n in (1, 17, 4, 90, 33, 2)]

    def capture(some: list[Tensor]) -> CapturedStates:
        ids = torch.cat(some)
        return engine.capture(Packed(ids, [len(x) for x in some], torch.arange(len(ids))))

    together, parts = capture(documents), [capture([x]) for x in documents]

    assert engine.is_packed
    assert torch.equal(together.aux, torch.cat([part.aux for part in parts]))
    assert torch.equal(together.last, torch.cat([part.last for part in parts]))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_one_prompt_at_a_time(name: str) -> None:
    prompts = random_prompts()

    found = {answer.index: answer for answer in engine_of(name).answer(prompts, GREEDY)}

    assert sorted(found) == list(range(len(prompts)))
    for index, prompt in enumerate(prompts):
        expected = generate_alone(model_of(name), prompt)
        assert list(found[index].ids) == expected
        assert found[index].is_truncated == (expected[-1] != END_ID)


def random_prompts(lengths: tuple[int, ...] = (9, 3, 14, 1)) -> list[Prompt]:
    rng = torch.Generator().manual_seed(2)
    return [
        Prompt(torch.randint(3, VOCAB, (length,), generator=rng).tolist(), seed=index)
        for index, length in enumerate(lengths)
    ]


@torch.no_grad()
def generate_alone(model: Any, prompt: Prompt, num_tokens: int = 7) -> list[int]:
    """The most probable token, again and again, without a cache."""
    ids = list(prompt.ids)
    while len(ids) < len(prompt.ids) + num_tokens:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == END_ID:
            break
    return ids[len(prompt.ids) :]


def llama_with_ends(*end_ids: int) -> TransformersEngine:
    return TransformersEngine(build_model("llama"), (1,), end_ids=frozenset(end_ids), name="it")


def test_an_answer_ends_with_the_first_of_any_end_tokens() -> None:
    (prompt,) = random_prompts((6,))
    sampling = Sampling(max_new_tokens=12, temperature=3.0)
    (endless,) = llama_with_ends().answer([prompt], sampling)
    _, first, second, *_ = dict.fromkeys(endless.ids)

    (answer,) = llama_with_ends(second, first).answer([prompt], sampling)

    stop = list(endless.ids).index(first) + 1
    assert 1 < stop < 12
    assert list(answer.ids) == list(endless.ids[:stop])
    assert not answer.is_truncated


def test_an_answer_without_an_end_token_is_truncated() -> None:
    prompts = random_prompts()

    answers = list(llama_with_ends().answer(prompts, Sampling(max_new_tokens=3)))

    assert [len(answer.ids) for answer in answers] == [3] * len(prompts)
    assert all(answer.is_truncated for answer in answers)


def test_answers_of_a_batch_end_where_each_does() -> None:
    # What one prompt's greedy answer has first ends it at once; the others go on.
    prompts = random_prompts()
    endless = {x.index: list(x.ids) for x in llama_with_ends().answer(prompts, GREEDY)}
    end = endless[2][0]

    found = {x.index: x for x in llama_with_ends(end).answer(prompts, GREEDY)}

    assert len(found[2].ids) == 1
    for index, ids in endless.items():
        stop = ids.index(end) + 1 if end in ids else len(ids)
        assert list(found[index].ids) == ids[:stop]
        assert found[index].is_truncated == (end not in ids)
    assert any(answer.is_truncated for answer in found.values())


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch() -> None:
    engine, sampling = llama_with_ends(), Sampling(max_new_tokens=9, temperature=1.3, top_p=0.95)
    prompts = [Prompt(prompt.ids, seed) for seed, prompt in enumerate(random_prompts() * 3)]

    together = {x.index: list(x.ids) for x in engine.answer(prompts, sampling)}
    backwards = {x.index: list(x.ids) for x in engine.answer(prompts[::-1], sampling)}

    for index, prompt in enumerate(prompts):
        (alone,) = engine.answer([prompt], sampling)
        assert together[index] == list(alone.ids)
        assert together[index] == backwards[len(prompts) - 1 - index]
    # The same prompt with other seeds.
    assert together[0] != together[4] != together[8]


def test_a_verifiers_own_ways_to_generate_do_not_change_its_answers() -> None:
    (prompt,) = random_prompts((6,))
    model = build_model("llama")
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.suppress_tokens = generate_alone(model_of("llama"), prompt)[:2]

    engine = TransformersEngine(model, (1,), end_ids=frozenset({END_ID}), name="it")

    (answer,) = engine.answer([prompt], GREEDY)
    assert list(answer.ids) == generate_alone(model_of("llama"), prompt)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_answers_end_at_the_last_position(name: str) -> None:
    """The tiny models have 128 positions; OPT's are learned, and it has no more."""
    sampling = Sampling(max_new_tokens=90, temperature=1.0)
    prompts = random_prompts((10, 30, 45, 60, 70, 120, 127, 128))
    engine = TransformersEngine(build_model(name), (1,), end_ids=frozenset(), name="it")

    found = {answer.index: answer for answer in engine.answer(prompts, sampling)}

    # 64 at once where there is room for more than that, else all that there is.
    lengths = [len(found[index].ids) for index in range(len(prompts))]
    assert lengths == [90, 90, 64, 64, 58, 8, 1, 1]
    assert all(answer.is_truncated for answer in found.values())
    for index in (2, 4):
        (alone,) = engine.answer([prompts[index]], sampling)
        assert list(alone.ids) == list(found[index].ids)


def test_prompts_beyond_a_batch_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculators_cli.core.engines.transformers_engine.CPU_BATCH", 3)
    prompts = random_prompts() * 2

    found = {x.index: list(x.ids) for x in engine_of("llama").answer(prompts, GREEDY)}

    assert sorted(found) == list(range(8))
    assert all(found[index] == found[index + 4] for index in range(4))
    assert found[0] == generate_alone(model_of("llama"), prompts[0])


@pytest.mark.parametrize("name", ["llama", "qwen3-next"])
def test_captured_states_stay_when_the_model_runs_on(name: str) -> None:
    engine = engine_of(name)
    packed = pack()
    found = engine.capture(packed)
    aux, last = found.aux.clone(), found.last.clone()
    other = torch.arange(3, 3 + sum(LENGTHS)) % VOCAB

    logits = engine.logits(other)
    list(engine.answer(random_prompts(), GREEDY))

    assert torch.equal(found.aux, aux)
    assert torch.equal(found.last, last)
    with torch.no_grad():
        expected = model_of(name)(input_ids=other[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(engine.capture(packed).aux, aux)


def test_a_window_that_the_attention_is_not_told_of_is_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend_without_window(*args: Any, **kwargs: Any) -> Any:
        return packed_attention.packed_attention(*args, **kwargs | {"sliding_window": None})

    monkeypatch.setitem(
        AttentionInterface._global_mapping, packed_attention.NAME, attend_without_window
    )

    engine = TransformersEngine(
        build_model("mistral"), LAYER_IDS, end_ids=frozenset({END_ID}), name="it"
    )

    assert not engine.is_packed
    assert_same_states(engine.capture(pack()), capture_alone(model_of("mistral"), pack()))


def test_documents_that_see_each_other_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_document(lengths: Sequence[int], device: torch.device) -> Packing:
        return Packing([sum(lengths)], device)

    monkeypatch.setattr(transformers_engine, "Packing", one_document)

    engine = TransformersEngine(
        build_model("llama"), LAYER_IDS, end_ids=frozenset({END_ID}), name="it"
    )

    assert not engine.is_packed
    assert_same_states(engine.capture(pack()), capture_alone(model_of("llama"), pack()))


@pytest.mark.parametrize("name", ["gemma3", "gemma3-with-images", "qwen2.5-vl", "llama4"])
def test_a_saved_verifier_is_loaded_with_its_text_part(name: str, tmp_path: Path) -> None:
    model_of(name).save_pretrained(tmp_path)

    model = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))

    engine = TransformersEngine(model, LAYER_IDS, end_ids=frozenset({END_ID}), name=str(tmp_path))
    assert_same_states(engine.capture(pack()), capture_alone(model_of(name), pack()))


def test_a_verifier_whose_attention_is_capped_is_loaded_with_the_cap(tmp_path: Path) -> None:
    model_of("gemma2").save_pretrained(tmp_path)

    model = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))

    assert_same_states(capture_alone(model, pack()), capture_alone(model_of("gemma2"), pack()))


def test_a_dtype_is_that_of_the_states(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.bfloat16, device=torch.device("cpu"))

    engine = TransformersEngine(model, LAYER_IDS, end_ids=frozenset(), name="it")

    states = engine.capture(pack())
    assert engine.is_packed
    assert states.aux.dtype == states.last.dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(SettingsError, match="cannot be loaded") as raised:
        load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))

    assert str(tmp_path) in str(raised.value)
    assert raised.value.hint


def test_fingerprints_have_what_states_depend_on() -> None:
    fingerprint = engine_of("llama").fingerprint

    assert fingerprint == {
        "engine": "transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": "float32",
    }


def test_a_family_with_several_states_per_token_is_refused() -> None:
    config = transformers.Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 2}, layer_types=["full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=6, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip

    with pytest.raises(SettingsError, match="`Gemma3nForCausalLM`"):
        TransformersEngine(
            transformers.AutoModelForCausalLM.from_config(config),
            (1,),
            end_ids=frozenset(),
            name="it",
        )


def test_every_kind_of_family_is_tried() -> None:
    assert len(PACKED) >= 12
    assert len(ALONE) >= 3

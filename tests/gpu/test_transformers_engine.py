"""The transformers engine on a GPU: packed in bfloat16, compiled, and wherever a document is."""

import pytest
import torch

from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from tests.tiny_families import END_ID, NUM_LAYERS, VOCAB, build_model

pytestmark = pytest.mark.gpu
LAYER_IDS = (1, 3, NUM_LAYERS)
LENGTHS = (5, 17, 1, 9)
# bfloat16 keeps 8 bits: some ten roundings a layer, over four layers, of independent sign.
MAX_ERROR = 2**-8 * 40**0.5


def make_engine(name: str, *, is_compiled: bool = False) -> TransformersEngine:
    model = build_model(name).to("cuda", torch.bfloat16)
    return TransformersEngine(
        model, LAYER_IDS, end_ids=frozenset({END_ID}), name="it", is_compiled=is_compiled
    )


def random_documents() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=rng) for length in LENGTHS]


def capture(engine: TransformersEngine, documents: list[torch.Tensor]) -> CapturedStates:
    ids = torch.cat(documents)
    return engine.capture(Packed(ids, [len(x) for x in documents], torch.arange(len(ids))))


def median_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Over tokens, of which a few may be routed to other experts by rounding."""
    difference = (found.float().cpu() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(difference.median())


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt-oss", "qwen3-moe"])
def test_packed_documents_have_the_states_of_the_cpu_in_float32(
    name: str, is_compiled: bool
) -> None:
    engine = make_engine(name, is_compiled=is_compiled)

    found = capture(engine, random_documents())

    exact_engine = TransformersEngine(
        build_model(name).bfloat16().float(), LAYER_IDS, end_ids=frozenset(), name="it"
    )
    exact = capture(exact_engine, random_documents())
    assert engine.is_packed
    assert found.aux.dtype == torch.bfloat16
    assert median_error(found.aux, exact.aux) <= MAX_ERROR
    assert median_error(found.last, exact.last) <= MAX_ERROR


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_document_has_the_same_bits_wherever_it_is_packed(name: str) -> None:
    engine = make_engine(name)
    first, second, third, fourth = random_documents()

    # Both are padded to the same length.
    one = capture(engine, [first, second, third, fourth]).aux[5:22]
    other = capture(engine, [fourth, third, second]).aux[10:27]

    assert torch.equal(one, other)

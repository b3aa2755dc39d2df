"""Documents are captured while the caller does something else, by vLLM or by a fake of it."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest
import torch

from speculators_cli.core.engines.ahead_capturer import AheadCapturer
from speculators_cli.core.engines.captured_layers import CapturedLayers
from speculators_cli.core.engines.document_stream import DocumentStream, VLLMStream, settle
from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.shared_stream import StreamClient, StreamServer
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.errors import DataError, MachineError
from tests.unit.engines.fakes import FakeVLLM, have_ended, pack, write_fake_vllm

LAYERS = CapturedLayers((5, 2), num_layers=8)
HIDDEN = 6
SECONDS = 60


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return write_fake_vllm(tmp_path, monkeypatch)


def open_stream() -> VLLMStream:
    return VLLMStream(VLLMSetup("org/verifier", "float32"), LAYERS, silent_seconds=SECONDS)


@pytest.fixture
def stream(vllm: FakeVLLM) -> Iterator[VLLMStream]:
    with closing(open_stream()) as stream:
        yield stream
    assert have_ended(vllm.pids())


def capturer_of(stream: DocumentStream) -> AheadCapturer:
    return AheadCapturer(
        stream,
        LAYERS,
        fingerprint={"engine": "vllm"},
        dtype=torch.float32,
        hidden_size=HIDDEN,
        device=torch.device("cpu"),
    )


def states(tokens: Sequence[int], layer_ids: Sequence[int]) -> torch.Tensor:
    """As the fake computes them: 1000 i + 10 k + h."""
    ids, layers = torch.tensor(tokens, dtype=torch.float32), torch.tensor(layer_ids)
    values = 1000 * ids[:, None, None] + 10 * layers[:, None] + torch.arange(HIDDEN)
    return values.flatten(1)


def test_files_come_back_for_each_document(stream: VLLMStream) -> None:
    futures = [stream.submit(ids) for ids in ([7, 8], [9])]

    one, other = (future.result(SECONDS) for future in futures)

    assert torch.equal(LAYERS.read(one, [7, 8]).flatten(1), states([7, 8], (2, 5, 8)))
    assert torch.equal(LAYERS.read(other, [9]).flatten(1), states([9], (2, 5, 8)))
    assert not one.exists()


def test_nothing_is_loaded_before_the_first_document(vllm: FakeVLLM) -> None:
    with closing(open_stream()):
        assert vllm.pids() == []


def test_packed_documents_have_their_own_rows(stream: VLLMStream) -> None:
    packed = Packed(
        input_ids=torch.tensor([7, 8, 9, 4, 5, 0, 0]),
        lengths=[3, 2, 2],
        rows=torch.tensor([2, 4]),
        aux_rows=torch.tensor([0, 1, 3]),
        num_zero_rows=2,
    )

    found = capturer_of(stream).capture(packed)

    expected = torch.cat([states([7, 8, 4], (2, 5)), torch.zeros(2, 2 * HIDDEN)])
    assert torch.equal(found.aux, expected)
    assert torch.equal(found.last, states([9, 5], (8,)))


def test_padding_is_not_computed(stream: VLLMStream, vllm: FakeVLLM) -> None:
    packed = Packed(
        torch.tensor([7, 8, 0, 0, 0]), [2, 3], torch.tensor([1]), aux_rows=torch.tensor([0])
    )

    capturer_of(stream).capture(packed)

    assert len(vllm.notes("request ")) == 1


def test_several_sequences_are_on_their_way_at_once(stream: VLLMStream) -> None:
    capturer = capturer_of(stream)
    tickets = [capturer.request(pack([[i, i + 1], [i + 2]], rows=[1])) for i in range(5)]

    found = [ticket.wait() for ticket in reversed(tickets)]

    for i, captured in zip(reversed(range(5)), found, strict=True):
        assert torch.equal(captured.aux, states([i, i + 1, i + 2], (2, 5)))


def test_a_process_that_dies_is_started_again_with_the_rest(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[2])
    with closing(open_stream()) as stream:
        found = capturer_of(stream).capture(pack([[i] for i in range(6)], rows=[0]))

    assert torch.equal(found.aux, states(range(6), (2, 5)))
    starts = [line.split()[0] for line in vllm.notes("request ")]
    assert starts.count("0") == 6
    assert starts.count("1") >= 4  # those whose files went with the first process, too


def test_a_process_that_dies_twice_is_an_error_with_the_sample(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[1, 1])
    with closing(open_stream()) as stream:
        ticket = capturer_of(stream).request(pack([[1], [2], [3]], rows=[0]), ["a", "b", "c"])

        with pytest.raises(
            MachineError, match=r"(?s)^The hidden states of . are missing: .*second time.*CUDA out"
        ):
            ticket.wait()
        with pytest.raises(MachineError, match="second time"):
            stream.submit([4]).result(SECONDS)


def test_a_verifier_that_cannot_be_loaded_is_an_error(vllm: FakeVLLM) -> None:
    vllm.plan(load_error=True)
    with (
        closing(open_stream()) as stream,
        pytest.raises(MachineError, match="cannot load `org/verifier`: ValueError: no memory"),
    ):
        stream.submit([1]).result(SECONDS)


def test_other_tokens_are_an_error_with_the_sample(vllm: FakeVLLM) -> None:
    vllm.plan(other_tokens="1")
    with (
        closing(open_stream()) as stream,
        pytest.raises(MachineError, match=r"states of b cannot be used: .* of other tokens"),
    ):
        capturer_of(stream).request(pack([[1], [2]], rows=[0]), ["a", "b"]).wait()


def test_a_sample_that_is_refused_is_named(stream: VLLMStream) -> None:
    with pytest.raises(DataError, match="states of long are missing: vLLM refuses tokens"):
        capturer_of(stream).request(pack([[1], [2] * 21], rows=[0]), ["short", "long"]).wait()


def test_what_nobody_waits_for_leaves_no_file(stream: VLLMStream, vllm: FakeVLLM) -> None:
    capturer = capturer_of(stream)
    dropped = [capturer.request(pack([[i]], rows=[0])) for i in range(6)]

    for ticket in dropped:
        ticket.cancel()
    capturer.capture(pack([[9]], rows=[0]))

    # The last one may be finished first, and some were being read when they were cancelled.
    def find_files() -> list[Path]:
        return [Path(file) for file in vllm.notes("states ")]

    give_up_at = time.monotonic() + SECONDS
    while time.monotonic() < give_up_at and (
        len(find_files()) < 7 or any(file.exists() for file in find_files())
    ):
        time.sleep(0.01)
    assert len(find_files()) == 7
    assert not any(file.exists() for file in find_files())


def test_a_closed_stream_fails_what_is_left(vllm: FakeVLLM) -> None:
    vllm.plan(load_seconds=600)
    stream = open_stream()
    future = stream.submit([1])
    while not vllm.notes("{"):  # until it loads
        time.sleep(0.05)

    stream.close()

    assert isinstance(future.exception(SECONDS), MachineError)
    assert have_ended(vllm.pids())


Reach = Callable[[], StreamClient]


@pytest.fixture
def reach(stream: VLLMStream, tmp_path: Path) -> Iterator[Reach]:
    folder = tmp_path / "shared"
    folder.mkdir()
    with closing(StreamServer(stream, folder)):
        yield lambda: StreamClient(folder)
    assert not folder.exists()


def test_other_processes_reach_the_stream(reach: Reach) -> None:
    with closing(reach()) as one, closing(reach()) as other:
        tickets = [
            capturer_of(client).request(pack([[i, 3], [i]], rows=[1]))
            for i, client in enumerate((one, other, one, other))
        ]

        for i, ticket in enumerate(tickets):
            assert torch.equal(ticket.wait().aux, states([i, 3, i], (2, 5)))


def test_errors_reach_the_other_processes(reach: Reach) -> None:
    with closing(reach()) as client:
        with pytest.raises(DataError, match="vLLM refuses tokens") as raised:
            client.submit([1] * 21).result(SECONDS)
        assert raised.value.hint
        assert client.submit([1]).result(SECONDS).exists()


def test_the_end_of_the_first_rank_is_an_error_of_the_others(tmp_path: Path) -> None:

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "vllm.socket"))
    listener.listen()
    with closing(StreamClient(tmp_path)) as client:
        connection, _ = listener.accept()
        future = client.submit([1])

        connection.close()
        listener.close()

        assert "has ended" in str(future.exception(SECONDS))
        assert "has ended" in str(client.submit([2]).exception(SECONDS))


def test_a_cancelled_document_has_its_file_removed(tmp_path: Path) -> None:
    file = tmp_path / "states"
    file.touch()
    future: Future[Path] = Future()
    future.cancel()

    settle(future, file=file)

    assert not file.exists()

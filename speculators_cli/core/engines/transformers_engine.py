"""TransformersEngine: the verifier in this process, on a GPU or the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.utils import logging

from speculators_cli.core.engines import packed_attention
from speculators_cli.core.engines.comparison import CHECKED_TOKENS, MAX_ERROR, median_error
from speculators_cli.core.engines.engine import (
    Answer,
    CapturedStates,
    Packed,
    Prompt,
    Sampling,
    aux_rows_of,
)
from speculators_cli.core.engines.float8_linear import use_float8
from speculators_cli.core.engines.packed_attention import Packing, packing
from speculators_cli.core.engines.sampling import SamplingProcessor
from speculators_cli.core.engines.verifier_layers import VerifierLayers, find_layers
from speculators_cli.core.errors import MachineError, SettingsError
from speculators_cli.core.models.family_code import quietly
from speculators_cli.core.reading import first_line

ROUND_TOKENS = 256  # packed sequences are padded to a multiple of it: few shapes to compile
ROUND_ANSWER = 64  # answers near the last position end at a multiple of it: few batches
CPU_BATCH = 64  # prompts answered together
MAX_BATCH = 512
MEMORY_HINT = (
    "Pass `--device-map auto` to place it on several GPUs, or `--engine vllm` with "
    "`--tensor-parallel-size`"
)


class TransformersEngine:
    """A verifier that answers prompts and computes hidden states in this process.

    Documents are packed end to end, without padding between them and without a mask. For families
    whose attention cannot be packed, each document is computed alone.

    Args:
        model: A causal language model of transformers, which it changes.
        layer_ids: Aux layers, ascending; id k is the output after k layers.
        end_ids: Tokens that end an answer.
        name: Of the verifier, for error messages.
        is_compiled: Whether decoder layers are compiled; None: on a GPU where it pays.
        packs_documents: Whether documents are computed together; None: on a GPU.
        is_float8: Whether the linear layers are computed in float8.

    Raises:
        SettingsError: The model has another layout than decoder layers and a final norm.
        MachineError: The device cannot multiply in float8.
    """

    def __init__(
        self,
        model: Any,
        layer_ids: Sequence[int],
        *,
        end_ids: frozenset[int],
        name: str,
        is_compiled: bool | None = None,
        packs_documents: bool | None = None,
        is_float8: bool = False,
    ) -> None:
        self.model = model
        # What `generate` is not told comes from there, such as a penalty on repeated tokens.
        model.generation_config = GenerationConfig()
        self.layer_ids = tuple(layer_ids)
        self.dtype: torch.dtype = model.dtype
        self._end_ids = sorted(end_ids)
        self.parts: VerifierLayers = find_layers(model, name)
        self._is_float8 = is_float8
        self._own_attention = self.model.config._attn_implementation  # noqa: SLF001
        self._attention = self._own_attention
        self._kept: _Kept | None = None
        self.parts.hook(self.layer_ids, self._keep_aux, self._keep_last)
        # Modules with their own forward, and the one over packed documents, where the output of the
        # final norm is never read.
        self._forwards: list[tuple[Any, Any, Any]] = [
            (self.parts.norm, self.parts.norm.forward, _skip)
        ]
        # In the precision of the weights: rounding to float8 would differ by as much as a mistake.
        self.is_packed = self._can_pack()
        if is_float8:
            use_float8(self.parts)
        is_gpu = self.parts.device.type != "cpu"
        self.packs_documents = is_gpu if packs_documents is None else packs_documents
        if is_compiled is None:
            is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
            is_compiled = self.parts.device.type == "cuda" and not is_spread
        if is_compiled and self.is_packed and not self.parts.has_experts:
            # Their forward only, without the hooks: all layers share one compiled graph.
            self._forwards += [
                (layer, layer.forward, torch.compile(layer.forward, dynamic=False))
                for layer in self.parts.layers
            ]

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Versions and choices that its results depend on."""
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"compute_dtype": "float8"} if self._is_float8 else {}),
        }

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.parts.decoder.get_input_embeddings().weight.shape[1])

    def capture(self, packed: Packed) -> CapturedStates:
        """Compute the hidden states of packed documents, none of which sees another.

        On a CPU each document is computed alone, so that its states do not depend in any bit on the
        others: which kernel multiplies matrices there depends on their number of rows.
        """
        device, aux_rows = self.parts.device, aux_rows_of(packed)
        aux = torch.empty(
            (len(aux_rows) + packed.num_zero_rows, len(self.layer_ids) * self.hidden_size),
            dtype=self.dtype,
            device=device,
        )
        last = torch.empty((len(packed.rows), self.hidden_size), dtype=self.dtype, device=device)
        aux[len(aux_rows) :].zero_()
        kept = _Kept(
            aux[: len(aux_rows)],
            last,
            aux_rows.to(device, non_blocking=True),
            packed.rows.to(device, non_blocking=True),
        )
        if self.is_packed and self.packs_documents and not len(packed.input_ids):
            self.join()
        elif self.is_packed and self.packs_documents:
            with self._keeping(kept):
                self._run_packed(packed.input_ids, packed.lengths, packed.position_ids)
        else:
            self._capture_each(packed, kept)
        return CapturedStates(aux, last)

    def join(self) -> None:
        """Compute one token, for nothing: ranks that share the weights gather them together."""
        self._run_packed(torch.zeros(1, dtype=torch.int64), [1])

    def _capture_each(self, packed: Packed, kept: "_Kept") -> None:
        """Compute documents one by one."""
        bounds = torch.tensor([0, *accumulate(packed.lengths)])
        places = zip(
            pairwise(bounds.tolist()),
            pairwise(torch.searchsorted(kept.aux_rows.cpu(), bounds).tolist()),
            pairwise(torch.searchsorted(kept.rows.cpu(), bounds).tolist()),
            strict=True,
        )
        for (start, end), aux, last in places:
            if aux[0] == aux[1] and last[0] == last[1]:
                continue  # a document of padding, or of no tokens
            with self._keeping(kept.of_document(start, slice(*aux), slice(*last))):
                if self.is_packed:
                    self._run_packed(packed.input_ids[start:end], [end - start])
                else:
                    self._run_alone(packed.input_ids[start:end])

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Compute the model's own logits of one document; [tokens, vocab]."""
        self._use(self._own_attention)
        ids = input_ids[None].to(self.parts.device)
        out: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return out

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """Answer prompts, in batches of similar length."""
        lengths = [len(prompt.ids) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        while order:
            longest = lengths[order[-1]]
            room = self._room_after(longest, sampling.max_new_tokens)
            size = self._batch_size(longest + room)
            # An answer's maximum length depends on its own prompt only.
            batch = [
                i
                for i in order[-size:]
                if self._room_after(lengths[i], sampling.max_new_tokens) == room
            ]
            order = order[: -len(batch)]
            own = replace(sampling, max_new_tokens=room)
            found = self._answer_batch([prompts[i] for i in batch], own)
            for index, ids in zip(batch, found, strict=True):
                is_truncated = not ids or ids[-1] not in self._end_ids
                yield Answer(index, ids, is_truncated)

    def close(self) -> None:
        """Release the model's memory."""
        del self.model, self.parts
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _answer_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
        self._use(self._own_attention)
        device = self.parts.device
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = self._end_ids[0] if self._end_ids else 0
        padding = [longest - len(prompt.ids) for prompt in prompts]
        ids = [[pad] * n + list(p.ids) for n, p in zip(padding, prompts, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(SamplingProcessor(prompts, sampling, device))
        out = self.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=processors,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=self._end_ids or None,
                pad_token_id=pad,
            ),
        )
        return [self._up_to_end(row) for row in out[:, longest:].tolist()]

    def _room_after(self, num_tokens: int, max_new_tokens: int) -> int:
        """Return how many tokens may follow a prompt: a verifier may have no further positions."""
        limit = getattr(self.parts.decoder.config, "max_position_embeddings", None)
        room = max_new_tokens if limit is None else limit - num_tokens
        if room >= max_new_tokens:
            return max_new_tokens
        return max(1, room - room % ROUND_ANSWER if room >= ROUND_ANSWER else room)

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        ends = (index for index, token in enumerate(tokens) if token in self._end_ids)
        return tokens[: next(ends, len(tokens) - 1) + 1]

    def _batch_size(self, num_tokens: int) -> int:
        """Return how many prompts of this length, with their answers, are computed together."""
        device = self.parts.device
        if device.type != "cuda":
            return CPU_BATCH
        return max(1, min(self.parts.count_rows_that_fit(num_tokens, self.dtype), MAX_BATCH))

    @torch.no_grad()
    def _run_packed(
        self, input_ids: Tensor, lengths: Sequence[int], position_ids: Tensor | None = None
    ) -> Packing:
        """Run the decoder over packed documents, padded to one of few lengths."""
        self._use(packed_attention.NAME)
        device = self.parts.device
        padding = -len(input_ids) % ROUND_TOKENS if device.type == "cuda" else 0
        all_lengths = [*lengths, padding] if padding else list(lengths)
        ids, positions = input_ids, position_ids
        if positions is None or padding:
            ids = torch.cat([input_ids, input_ids.new_zeros(padding)])
            positions = torch.cat([torch.arange(length) for length in all_lengths])
        with packing(Packing(all_lengths, device)) as documents:
            self.parts.decoder(
                input_ids=ids[None].to(device),
                position_ids=positions[None].to(device),
                use_cache=False,
            )
        return documents

    @torch.no_grad()
    def _run_alone(self, input_ids: Tensor) -> None:
        self._use(self._own_attention)
        self.parts.decoder(input_ids=input_ids[None].to(self.parts.device), use_cache=False)

    def _use(self, attention: str) -> None:
        """Switch the implementation of attention; layers are compiled for packed documents only."""
        if attention == self._attention:
            return
        self.model.set_attn_implementation(attention)
        self._attention = attention
        for module, own, over_packed in self._forwards:
            module.forward = over_packed if attention == packed_attention.NAME else own

    @contextmanager
    def _keeping(self, kept: "_Kept") -> Iterator[None]:
        """Write the states that pass the hooks within the block."""
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None

    def _keep_aux(self, column: int, states: Tensor) -> None:
        if self._kept is not None:
            size, kept = self.hidden_size, self._kept
            rows = kept.aux_rows.to(states.device)
            own = kept.aux[:, column * size : (column + 1) * size]
            own.copy_(states[0].index_select(0, rows))

    def _keep_last(self, states: Tensor) -> None:
        if self._kept is not None:
            rows = self._kept.rows.to(states.device)
            self._kept.last.copy_(states[0].index_select(0, rows))

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Whether packed documents have the states that each has alone; measured on two of them."""
        if not self.parts.has_known_attention:
            return False
        generator = torch.Generator().manual_seed(0)
        vocab = self.parts.decoder.get_input_embeddings().weight.shape[0]
        lengths = CHECKED_TOKENS
        ids = torch.randint(vocab, (sum(lengths),), generator=generator)
        packed, alone = (self._check_buffers(sum(lengths)) for _ in range(2))
        rows = torch.arange(sum(lengths), device=self.parts.device)
        try:
            with self._keeping(_Kept(*packed, rows, rows)):
                documents = self._run_packed(ids, lengths)
        except (NotImplementedError, ValueError):  # it takes no other attention, or builds a mask
            return False
        is_called = documents.num_calls > 0 and documents.has_window >= self.parts.has_window
        bounds = [0, *accumulate(lengths)]
        for start, end in pairwise(bounds):
            own = torch.arange(end - start, device=self.parts.device)
            with self._keeping(_Kept(alone[0][start:end], alone[1][start:end], own, own)):
                self._run_alone(ids[start:end])
        errors = [median_error(own, exact) for own, exact in zip(packed, alone, strict=True)]
        return is_called and max(errors) <= MAX_ERROR[self.dtype]

    def _check_buffers(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        width = len(self.layer_ids) * self.hidden_size
        return (
            torch.empty((num_tokens, width), dtype=self.dtype, device=self.parts.device),
            torch.empty((num_tokens, self.hidden_size), dtype=self.dtype, device=self.parts.device),
        )


def _skip(states: Tensor) -> Tensor:
    return states


@dataclass(frozen=True)
class _Kept:
    """Where the hooks write."""

    aux: Tensor  # [aux rows, aux*hidden]
    last: Tensor  # [rows, hidden]
    aux_rows: Tensor  # [aux rows], int64: tokens
    rows: Tensor  # [rows], int64: tokens

    def of_document(self, start: int, aux: slice, last: slice) -> "_Kept":
        """Return the part of one document, whose first token is `start`."""
        return _Kept(
            self.aux[aux], self.last[last], self.aux_rows[aux] - start, self.rows[last] - start
        )


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    memory_hint: str = MEMORY_HINT,
) -> Any:
    """Load a verifier with its LM head, ready to compute.

    Args:
        name: A folder or hub id.
        dtype: Of its weights and computations.
        device: Where it is loaded, without `device_map`.
        device_map: As in transformers: places the layers on several devices.
        trust_remote_code: Whether custom code from the verifier's repository may run.
        memory_hint: What to do if it does not fit.

    Raises:
        SettingsError: transformers cannot load it.
        MachineError: There is too little memory.
    """
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if device_map is not None or device.type == "cuda":
        options["device_map"] = device_map or device
    try:
        with quietly():
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
                # Some versions of transformers choose SDPA, which leaves the cap out.
                options["attn_implementation"] = "eager"
            is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_remote_code
            auto = AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM
            return auto.from_pretrained(name, **options).eval()
    except torch.OutOfMemoryError:
        raise MachineError(
            f"Verifier `{name}` does not fit into the memory of `{device}`",
            hint=memory_hint,
        ) from None
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SettingsError(
            f"Verifier `{name}` cannot be loaded: {first_line(error)}",
            hint="Pass a folder or hub id with `config.json` and `.safetensors` weights, or "
            "`--engine vllm`",
        ) from None

"""Job: what an evaluation needs, read and checked in the order in which it is cheap."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.conversations.prompt_ids import PromptRenderer
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.engines.devices import choose_device, choose_dtype
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.sampling import seed_of
from speculators_cli.core.errors import CheckpointError, MachineError, SettingsError
from speculators_cli.core.evaluation.checks import (
    check_fit,
    check_num_draft_tokens,
    read_source,
)
from speculators_cli.core.evaluation.diagnosis import (
    Cause,
    Diagnosis,
    Diagnostician,
    is_suspicious,
    neighbours,
)
from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.measurement import Measurement, Work, measure
from speculators_cli.core.evaluation.prompt_formats import try_formats
from speculators_cli.core.evaluation.questions import Questions, read_questions
from speculators_cli.core.evaluation.report import (
    Comparison,
    compare,
)
from speculators_cli.core.evaluation.speedup import (
    Speedups,
    fill_between,
    predict_speedups,
    time_drafter,
    time_verifier,
)
from speculators_cli.core.evaluation.trained_verifier import (
    find_trained_verifier,
    weigh_trained_verifier,
)
from speculators_cli.core.evaluation.verifier import LoadedVerifier, load_verifier
from speculators_cli.core.models.verifier import VerifierConfig, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_tokens import VerifierTokens, load_verifier_tokens
from speculators_cli.core.place import Place
from speculators_cli.core.progress import Progress
from speculators_cli.settings.evaluate import EvaluateSettings

CPU_BATCH, GPU_BATCH = 16, 64  # prompts drafted and verified together


class Job:
    """The draft, its verifier and the prompts of one evaluation.

    Args:
        settings: All settings.
        progress: Reports progress, and what is doubtful.

    Raises:
        SettingsError: A setting or the verifier cannot be used.
        CheckpointError: A draft is incomplete, or is another verifier's.
        MachineError: There is no such device, or the hub cannot be reached.
    """

    def __init__(self, settings: EvaluateSettings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        given = self.settings.source
        self.device = choose_device(self.settings.engine.device, Place())
        self.dtype = choose_dtype(self.settings.engine.dtype, self.device)
        self.source = read_source(given.checkpoint, given, "CHECKPOINT", self.progress)
        self.files = VerifierFiles(self.source.config.verifier_name_or_path)
        self.num_draft_tokens = (
            self.settings.drafting.num_speculative_tokens or self.source.config.num_draft_tokens
        )
        self.other: TrainedDraft | None = None
        self._check(self.source)
        if given.against is not None:
            self.other = read_source(given.against, given, "--against", self.progress)
            self._check(self.other)

    @property
    def is_cuda(self) -> bool:
        """Whether the verifier is on a GPU."""
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """Name of the GPU, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    @cached_property
    def config(self) -> VerifierConfig:
        """Config of the verifier."""
        trusts = self.settings.source.trust_remote_code
        return read_verifier_config(self.files, trust_remote_code=trusts)

    @cached_property
    def tokens(self) -> VerifierTokens:
        """Tokenizer and vocabulary of the verifier."""
        trusts = self.settings.source.trust_remote_code
        return load_verifier_tokens(self.files, self.config, trust_remote_code=trusts)

    @cached_property
    def questions(self) -> Questions:
        """The prompts."""
        thinking = self.settings.prompts.thinking
        vocab_size = self.tokens.vocab_size
        renderer = PromptRenderer(
            self.tokens.tokenizer,
            thinking=None if thinking is None else thinking == "on",
            vocab_size=vocab_size,
        )
        # The last chain may begin one token before the end of an answer.
        num_new = self.settings.drafting.max_new_tokens + self.num_draft_tokens
        max_tokens = max(self.config.max_position_embeddings - num_new, 1)
        found = read_questions(
            self.settings.prompts, renderer, vocab_size=vocab_size, max_tokens=max_tokens
        )
        if found.num_too_long:
            self.progress.warn(
                f"{found.num_too_long:,} prompts are left out: they have more than "
                f"{max_tokens:,} tokens, and the verifier's maximum length is "
                f"{self.config.max_position_embeddings:,}"
            )
        return found

    @cached_property
    def work(self) -> Work:
        """The answers to generate."""
        drafting = self.settings.drafting
        prompts = [
            Prompt(question.ids, seed_of(drafting.seed, question.index))
            for question in self.questions.questions
        ]
        given = self.settings.engine.batch_size
        return Work(
            prompts,
            Sampling(drafting.max_new_tokens, drafting.temperature),
            given or (GPU_BATCH if self.is_cuda else CPU_BATCH),
        )

    @cached_property
    def hooked_layers(self) -> tuple[int, ...]:
        """Layers that a draft reads, and those beside them, ascending."""
        own = self.source.config.target_layer_ids
        layer_ids = neighbours(own, self.config.num_layers)
        if self.other is not None:
            layer_ids.update(self.other.config.target_layer_ids)
        return tuple(sorted(layer_ids))

    @cached_property
    def verifier(self) -> LoadedVerifier:
        """The verifier, loaded when it is first needed."""
        loaded = self._load(self.files, self.config, self.tokens)
        if not loaded.is_batched:
            self.progress.warn(
                f"The layers of verifier `{loaded.name}` cannot keep keys and values by position: "
                "prompts are answered one at a time, and every pass computes all tokens",
                hint="Lower `--max-prompts` or `--max-new-tokens`",
            )
        return loaded

    def build_drafter(
        self,
        source: TrainedDraft,
        num_draft_tokens: int | None = None,
        *,
        verifier: LoadedVerifier | None = None,
    ) -> Drafter:
        """A drafter on the device of a verifier, which then returns the states of its layers."""
        verifier = verifier or self.verifier
        verifier.rows.select_layers(source.config.target_layer_ids)
        embedding = verifier.embedding
        if source.embedding is not None:
            embedding = source.embedding.to(embedding.device)
        drafter = source.build_drafter(
            embedding,
            num_draft_tokens=num_draft_tokens or self.num_draft_tokens,
            head=verifier.head,
        )
        if num_draft_tokens is None:
            check_num_draft_tokens(drafter, self.num_draft_tokens, source)
        return drafter

    def compare(self, measured: Measurement, own: Sequence[Answer]) -> Comparison | None:
        """Measure the draft of `--against` on the same prompts."""
        if self.other is None:
            return None
        drafter = self.build_drafter(self.other)
        found = measure(self.verifier, drafter, self.work, own, progress=self.progress)
        return compare(self.other.name, measured, found, seed=self.settings.drafting.seed)

    def predict_speedups(self, measured: Measurement) -> Speedups:
        """Time single passes after a prompt of median length, and predict the speedups."""
        lengths = sorted(self.work.prompts, key=lambda prompt: len(prompt.ids))
        prompt = lengths[len(lengths) // 2].ids
        rows, num_draft_tokens = self.verifier.rows, self.num_draft_tokens
        drafting = [
            time_drafter(self.build_drafter(self.source, count), rows, prompt)
            for count in dict.fromkeys((1, num_draft_tokens))
        ]
        return predict_speedups(
            measured.acceptance_rates,
            time_verifier(rows, prompt, num_draft_tokens),
            fill_between(drafting[0], drafting[-1], num_draft_tokens),
        )

    def diagnose(self, measured: Measurement) -> Diagnosis | None:
        """Find what lowers the acceptance length, if asked, or if it is far below training's."""
        if not self.settings.result.diagnose and not is_suspicious(self.source, measured):
            return None
        seed, questions = self.settings.drafting.seed, self.questions.questions
        self.progress.info("Diagnosing: one thing is changed at a time")
        drafter = self.build_drafter(self.source)
        tried = try_formats(
            self.verifier,
            drafter,
            questions,
            measured.answers,
            self.work,
            seed=seed,
            progress=self.progress,
        )
        others = (*tried, *self._try_trained_verifier(measured))
        diagnostician = Diagnostician(
            self.source,
            self.verifier,
            self.hooked_layers,
            self.config,
            num_draft_tokens=self.num_draft_tokens,
            seed=seed,
        )
        pairs = zip(questions, measured.answers, strict=True)
        return diagnostician.diagnose([(x.ids, answer) for x, answer in pairs], others)

    def _try_trained_verifier(self, measured: Measurement) -> Iterator[Cause]:
        """Use the verifier of the draft's training, if it is another one that can be read."""
        name = find_trained_verifier(self.source, self.files.name_or_path)
        if name is None:
            return
        try:
            files, trusts = VerifierFiles(name), self.settings.source.trust_remote_code
            config = read_verifier_config(files, trust_remote_code=trusts)
            check_fit(self.source, config, files.read_vocab_size(config.modules), self.progress)
            tokens = load_verifier_tokens(files, config, trust_remote_code=trusts)
            trained = self._load(files, config, tokens)
        except (SettingsError, CheckpointError, MachineError) as error:
            self.progress.warn(f"The verifier of the training is not tried: {error}")
            return
        yield weigh_trained_verifier(
            trained,
            self.build_drafter(self.source, verifier=trained),
            self.verifier,
            measured.answers,
            self.work,
            seed=self.settings.drafting.seed,
            progress=self.progress,
        )

    def _load(
        self, files: VerifierFiles, config: VerifierConfig, tokens: VerifierTokens
    ) -> LoadedVerifier:
        return load_verifier(
            files,
            self.hooked_layers,
            dtype=self.dtype,
            device=self.device,
            config=config,
            tokens=tokens,
            trust_remote_code=self.settings.source.trust_remote_code,
        )

    def _check(self, source: TrainedDraft) -> None:
        vocab_size = self.files.read_vocab_size(self.config.modules)
        check_fit(source, self.config, vocab_size, self.progress)

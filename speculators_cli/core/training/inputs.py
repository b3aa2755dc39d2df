"""Inputs: everything a run reads and checks before it loads weights or writes files."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.data_config import (
    LayerIds,
    choose_captured_layers,
    resolve_layer_ids,
    warn_of_assumed,
    warn_of_contradiction,
)
from speculators_cli.core.data.source import SampleSource, split
from speculators_cli.core.data.sources import Request, choose_capture, open_samples
from speculators_cli.core.data.tokens import StatesShape
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.drafts.trained_draft import ASSUMED_HINT, TrainedDraft
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.models.verifier import VerifierConfig, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.warm_start import (
    check_embedding,
    check_fit,
    choose_layer_ids,
    choose_vocab_map,
)
from speculators_cli.settings.base import Settings, changed_flags
from speculators_cli.settings.train import DataSettings, DraftArch, TrainSettings


@dataclass(frozen=True)
class Inputs:
    """Samples, vocabulary map and verifier of a run, checked for consistency."""

    samples: SampleSource  # to train on
    validation_samples: SampleSource  # may be empty
    vocab_map: VocabMap
    verifier_files: VerifierFiles
    verifier_config: VerifierConfig
    layer_ids: LayerIds
    source: TrainedDraft | None  # the trained draft to start from
    own_values: Mapping[str, Any]  # of a fresh draft's config, chosen by its algorithm

    @property
    def is_live(self) -> bool:
        """Whether the verifier computes hidden states while training."""
        return self.samples.is_live or self.validation_samples.is_live

    def needs_whole_verifier(self, settings: TrainSettings) -> bool:
        """Whether it is in the memory of each rank, which computes hidden states with it."""
        return self.is_live and not settings.capture.is_apart

    def draft_config(self, settings: TrainSettings) -> DraftConfig:
        """Config of the draft; sizes and RoPE are the verifier's."""
        own = settings.algorithm_settings
        if self.source is None:
            return fresh_config(
                settings.draft.algorithm,
                own,
                self.verifier_config,
                self.vocab_map,
                self.layer_ids,
                arch=settings.draft.draft_arch,
                num_layers=settings.draft.num_layers,
                own_values=self.own_values,
            )
        fixed = _config_of_run(self.verifier_config, self.layer_ids)
        config = replace(self.source.config, **fixed)
        adapted: DraftConfig = ALGORITHMS[settings.draft.algorithm].adapt_config(config, own)
        return adapted


def fresh_config(
    algorithm: str,
    algorithm_settings: Settings,
    verifier: VerifierConfig,
    vocab_map: VocabMap,
    layer_ids: LayerIds,
    *,
    arch: DraftArch,
    num_layers: int,
    own_values: Mapping[str, Any] = MappingProxyType({}),
) -> DraftConfig:
    """The config of a draft that is trained from scratch."""
    shape: dict[str, Any] = {
        "arch": arch.value,
        "hidden_size": verifier.hidden_size,
        "target_hidden_size": verifier.hidden_size,
        "intermediate_size": verifier.intermediate_size,
        "num_layers": num_layers,
        "num_heads": verifier.num_heads,
        "num_kv_heads": verifier.num_kv_heads,
        "head_dim": verifier.head_dim,
        "rms_norm_eps": verifier.rms_norm_eps,
        "rope_parameters": verifier.rope_parameters,
        "max_position_embeddings": verifier.max_position_embeddings,
        "vocab_size": vocab_map.vocab_size,
        "draft_vocab_size": vocab_map.draft_vocab_size,
    }
    shape |= _config_of_run(verifier, layer_ids) | dict(own_values)
    fresh: DraftConfig = ALGORITHMS[algorithm].build_config(algorithm_settings, shape)
    return fresh


def _config_of_run(verifier: VerifierConfig, layer_ids: LayerIds) -> dict[str, Any]:
    """Config fields that depend only on the verifier and samples of the run."""
    return {
        "target_layer_ids": layer_ids.ids,
        "are_layer_ids_assumed": layer_ids.is_assumed,
        "verifier_name_or_path": verifier.name_or_path,
        "verifier_architectures": verifier.architectures,
    }


def read_inputs(
    settings: TrainSettings,
    *,
    source: TrainedDraft | None = None,
    num_ranks: int,
    index_file: Path | None,
    progress: Progress,
) -> Inputs:
    """Read headers and configs, and check that they are consistent.

    Args:
        settings: Paths of the samples, vocabulary maps and verifier.
        source: The trained draft to start from.
        num_ranks: Ranks that share the samples.
        index_file: Cache for the headers of the samples; None disables it.
        progress: Reports progress, and samples that are skipped.

    Raises:
        SettingsError: Vocabulary maps or verifier cannot be used.
        DataError: The samples cannot be used, or are another verifier's.
        MachineError: The hub cannot be reached.
    """
    draft, data = settings.draft, settings.data
    _refuse_conversations(data)
    files = VerifierFiles(draft.verifier_name_or_path)
    verifier = read_verifier_config(files, trust_remote_code=draft.trust_remote_code)
    files.find_parts(is_tied=verifier.is_tied, modules=verifier.modules)
    vocab_size = files.read_vocab_size(verifier.modules)
    vocab_map = _read_vocab_map(settings, source, verifier, files, vocab_size)
    val_capture = choose_capture(settings.capture.capture, data.val_data_path)
    wanted = Request(
        data.data_path,
        data_format=data.data_format,
        version=data.data_format_version,
        index_file=index_file,
        max_bad_samples=data.max_bad_samples,
        alignment=ALGORITHMS[draft.algorithm].alignment,
        capture=choose_capture(settings.capture.capture, data.data_path),
    )
    if "online" in (wanted.capture, val_capture):
        wanted = replace(wanted, live=_live_shape(settings, source, verifier))
    samples = scanned = open_samples(wanted, progress)
    check_samples_fit(samples, verifier, vocab_size)
    layer_ids = resolve_layer_ids(
        samples.configs,
        num_verifier_layers=verifier.num_layers,
        num_aux_layers=samples.num_aux_layers,
        data_format=samples.format,
        given=draft.target_layer_ids,
    )
    if source is not None:
        is_given = draft.target_layer_ids is not None
        layer_ids = choose_layer_ids(source, layer_ids, is_given=is_given, progress=progress)
    warn_of_assumed(layer_ids, progress, whose="The samples have")
    warn_of_contradiction(
        samples.configs,
        num_verifier_layers=verifier.num_layers,
        given=draft.target_layer_ids,
        progress=progress,
    )
    if data.val_data_path:
        others = replace(wanted, folders=data.val_data_path, index_file=None, capture=val_capture)
        validation = open_samples(others, progress)
        check_samples_fit(validation, verifier, vocab_size)
    else:
        samples, validation = split(scanned, data.train_data_ratio)
    _check_capture(settings, is_live=samples.is_live or validation.is_live)
    check_targets(samples, data.total_seq_len, data.data_path[0])
    if not _can_validate(validation, data.total_seq_len, progress):
        validation = validation.select(())
    _check_enough(samples, data.total_seq_len, num_ranks)
    _warn_of_other_verifier(scanned, verifier, progress)
    _warn_of_other_rope(verifier, source, progress)
    _warn_of_lost_tokens(samples, data.total_seq_len, progress)
    own_values = _choose_values(settings, files, vocab_size) if source is None else {}
    inputs = Inputs(samples, validation, vocab_map, files, verifier, layer_ids, source, own_values)
    inputs.draft_config(settings)  # refuses settings of no draft before anything is written
    if index_file is not None:
        index_file.parent.mkdir(parents=True, exist_ok=True)
        scanned.write_index(index_file)
    return inputs


def _choose_values(
    settings: TrainSettings, files: VerifierFiles, vocab_size: int
) -> Mapping[str, Any]:
    return ALGORITHMS[settings.draft.algorithm].choose_values(
        settings.algorithm_settings,
        files,
        vocab_size,
        trust_remote_code=settings.draft.trust_remote_code,
    )


def _refuse_conversations(data: DataSettings) -> None:
    if data.conversations is not None:
        raise SettingsError(
            f"`--data-path`: `{data.conversations}` has conversations, which are not tokens yet",
            hint="Write their tokens with `speculators generate-data --tokens-only`, and pass the "
            "output folder",
        )


def _check_capture(settings: TrainSettings, *, is_live: bool) -> None:
    """Refuse settings of online capture where all hidden states are stored."""
    capture = settings.capture
    unread = changed_flags(capture, type(capture).model_fields.keys() - {"capture"})
    if unread and not is_live:
        flags, is_one = ", ".join(f"`{flag}`" for flag in unread), len(unread) == 1
        raise SettingsError(
            f"{flags} {'is' if is_one else 'are'} of no use: `{settings.data.data_path[0]}` holds "
            "samples with hidden states",
            hint=f"Leave {'it' if is_one else 'them'} out, or pass `--capture online` and a folder "
            "with shards of tokens",
        )


def _read_vocab_map(
    settings: TrainSettings,
    source: TrainedDraft | None,
    verifier: VerifierConfig,
    files: VerifierFiles,
    vocab_size: int,
) -> VocabMap:
    """The draft vocabulary: that of the draft to start from, all tokens, or maps in files."""
    draft = settings.draft
    if source is not None:
        check_fit(source, verifier, vocab_size)
        check_embedding(source, files, verifier)
        return choose_vocab_map(source, settings)
    if draft.full_vocab:
        return VocabMap.full(vocab_size)
    vocab_map = VocabMap.load(draft.d2t_path, draft.t2d_path)
    vocab_map.check(vocab_size)
    return vocab_map


def _live_shape(
    settings: TrainSettings, source: TrainedDraft | None, verifier: VerifierConfig
) -> StatesShape:
    """Hidden states that the verifier computes while training."""
    given = settings.draft.target_layer_ids
    if given is None and source is not None:
        given = source.config.target_layer_ids
    num_aux_layers = ALGORITHMS[settings.draft.algorithm].num_aux_layers
    layer_ids = choose_captured_layers(given, verifier.num_layers, num_aux_layers)
    return StatesShape(verifier.hidden_size, layer_ids)


def check_samples_fit(samples: SampleSource, verifier: VerifierConfig, vocab_size: int) -> None:
    """Refuse samples of another verifier.

    Raises:
        DataError: Their hidden size or token ids are not the verifier's.
    """
    if samples.hidden_size != verifier.hidden_size:
        raise DataError(
            f"The samples have hidden size {samples.hidden_size:,}, verifier "
            f"`{verifier.name_or_path}` has {verifier.hidden_size:,}",
            hint="Pass the verifier that the samples were captured from",
        )
    if samples.max_token_id >= vocab_size:
        raise DataError(
            f"The samples have token ids up to {samples.max_token_id:,}, verifier "
            f"`{verifier.name_or_path}` has {vocab_size:,} tokens",
            hint="Pass the verifier that the samples were captured from",
        )


def _check_enough(samples: SampleSource, total_seq_len: int, num_ranks: int) -> None:
    """Refuse more ranks than packed sequences: some would be idle."""
    if num_ranks == 1:
        return
    num_sequences = samples.count_sequences(total_seq_len)
    if num_sequences < num_ranks:
        raise DataError(
            f"{num_ranks} ranks need as many packed sequences, but there are only {num_sequences}",
            hint="Start fewer ranks, lower `--total-seq-len`, or add samples",
        )


def _warn_of_other_verifier(
    samples: SampleSource, verifier: VerifierConfig, progress: Progress
) -> None:
    """Warn if the data is for another verifier; only names are compared, not folders."""
    for config in samples.configs:
        if (
            config.verifier is not None
            and Path(config.verifier).name != Path(verifier.name_or_path).name
        ):
            progress.warn(
                f"`{config.file}` is for verifier `{config.verifier}`, "
                f"not `{verifier.name_or_path}`"
            )


def check_targets(samples: SampleSource, total_seq_len: int, folder: Path) -> None:
    """Refuse samples that have no token to predict after truncation.

    Raises:
        DataError: No sample has a supervised token within `--total-seq-len`.
    """
    if samples.count_without_target(total_seq_len) < len(samples):
        return
    shown = shlex.quote(str(folder))
    if samples.num_supervised_tokens == 0:
        raise DataError(
            f"None of the {len(samples):,} samples to train on has a supervised token after its "
            "first: there are no positions to train on",
            hint=f"Set `loss_mask` to 1 for tokens of answers; `speculators inspect-data {shown}` "
            "shows how many are supervised",
        )
    first = min(x.first_target for x in samples.headers if x.first_target >= 0)
    raise DataError(
        f"None of the {len(samples):,} samples to train on has a supervised token within "
        f"`--total-seq-len` `{total_seq_len}`: they are truncated before their answers, the "
        f"earliest of which begins after {first:,} tokens",
        hint=f"Pass `--total-seq-len {samples.lengths.max()}`, the longest sample's, or shorten "
        "the prompts",
    )


def _can_validate(samples: SampleSource, total_seq_len: int, progress: Progress) -> bool:
    """Whether validation samples have targets; warns if all or some do not."""
    num_idle = samples.count_without_target(total_seq_len)
    if not num_idle:
        return True
    where = f"within `--total-seq-len` `{total_seq_len}`"
    if num_idle == len(samples):
        progress.warn(
            f"None of the {num_idle:,} validation samples has a supervised token {where}: "
            "nothing is validated, and the latest checkpoint counts as the best",
            hint="Pass other samples as `--val-data-path`, or lower `--train-data-ratio`",
        )
        return False
    progress.warn(
        f"{num_idle:,} of {len(samples):,} validation samples have no supervised token {where}",
        hint="Run `speculators inspect-data` to list them",
    )
    return True


def _warn_of_other_rope(
    verifier: VerifierConfig, source: TrainedDraft | None, progress: Progress
) -> None:
    """Warn if the draft layers cannot use the RoPE of the verifier, or if theirs was assumed."""
    if source is not None:
        if source.assumption is not None:
            progress.warn(source.assumption, hint=ASSUMED_HINT)
    elif verifier.rope_left_out is not None:
        rope = verifier.rope_parameters
        progress.warn(
            f"The RoPE of verifier `{verifier.name_or_path}` {verifier.rope_left_out}: the draft "
            f"is trained and served with `{rope['rope_type']}` RoPE, theta {rope['rope_theta']:g}"
        )


def _warn_of_lost_tokens(samples: SampleSource, total_seq_len: int, progress: Progress) -> None:
    """Warn about samples that are only partly trained on, or not at all."""
    over = samples.lengths - total_seq_len
    if (over > 0).any():
        progress.warn(
            f"{(over > 0).sum():,} of {len(samples):,} samples are longer than a packed sequence: "
            f"{over[over > 0].sum():,} tokens are truncated",
            hint=f"Raise `--total-seq-len`; the longest has {samples.lengths.max():,}",
        )
    num_unsupervised = sum(header.first_target < 0 for header in samples.headers)
    if num_unsupervised:
        progress.warn(
            f"{num_unsupervised:,} of {len(samples):,} samples have no supervised token",
            hint="Run `speculators inspect-data` to list them",
        )
    num_cut = samples.count_without_target(total_seq_len) - num_unsupervised
    if num_cut:
        progress.warn(
            f"{num_cut:,} of {len(samples):,} samples have all supervised tokens truncated: their "
            f"answers begin beyond `--total-seq-len` `{total_seq_len}`",
            hint=f"Raise `--total-seq-len`; the longest has {samples.lengths.max():,}",
        )

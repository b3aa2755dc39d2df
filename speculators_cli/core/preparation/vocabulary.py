"""Choose the draft vocabulary by the frequency of target tokens."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.sources import choose_capture
from speculators_cli.core.data.token_counts import (
    FILE_NAME,
    TokenCounts,
    read_token_freq,
    write_token_freq,
)
from speculators_cli.core.data.tokens import StatesShape, read_tokens
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.files import check_output_dir
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.build_vocab_map import BuildVocabMapSettings, VocabularySettings

if TYPE_CHECKING:
    from speculators_cli.core.models.verifier import FrozenVerifier

COMPARED_SIZES = (8_000, 16_000, 32_000, 64_000)


@dataclass(frozen=True)
class VocabMapReport:
    """The draft vocabulary chosen, and its coverage of the target tokens."""

    draft_vocab_size: int
    vocab_size: int
    num_counted_tokens: int
    num_special_tokens: int  # kept regardless of their count
    coverage: float  # fraction of the counted tokens within the draft vocabulary
    coverage_by_size: dict[int, float]  # coverage at other sizes
    probability_mass: float | None  # of the verifier, within the draft vocabulary
    d2t_path: Path
    t2d_path: Path
    token_freq_path: Path | None  # None if the counts were read from files

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with paths as strings."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }


def build_vocab_map(
    settings: BuildVocabMapSettings, *, progress: Progress = SILENT
) -> VocabMapReport:
    """Count tokens, choose the draft vocabulary, write both maps.

    Raises:
        SettingsError: The verifier, a size or a file of counts cannot be used.
        DataError: The samples cannot be used, or have no supervised tokens.
        MachineError: The hub is unreachable.
    """
    vocabulary, output_dir = settings.vocabulary, settings.files.output_dir
    check_output_dir(output_dir, flag="--output-dir")
    vocab_size = read_vocab_size(vocabulary)
    always = choose_special_ids(vocabulary, vocab_size, progress)
    samples, counts = count(settings, vocab_size, progress)
    if not counts.any():
        if samples is None:
            raise SettingsError(
                "`--token-freq-path`: every count is zero",
                hint="Pass `--data-path` with samples that have supervised tokens",
            )
        raise DataError(
            "No token was counted: the samples have no supervised tokens",
            hint="Set `loss_mask` to 1 at the answers' tokens, or count all with `--all-tokens`",
        )
    vocab_map = VocabMap.choose(counts, vocabulary.draft_vocab_size, always=always)
    mass = None
    if samples is not None and not samples.is_live and _measures_mass(vocabulary):
        mass = measure_mass(samples, vocabulary, vocab_map, progress)
    output_dir.mkdir(parents=True, exist_ok=True)
    d2t_path, t2d_path = output_dir / "d2t.npy", output_dir / "t2d.npy"
    vocab_map.save(d2t_path, t2d_path)
    token_freq_path = None
    if samples is not None:
        token_freq_path = output_dir / FILE_NAME
        write_token_freq(counts, token_freq_path)
    return VocabMapReport(
        draft_vocab_size=vocab_map.draft_vocab_size,
        vocab_size=vocab_size,
        num_counted_tokens=int(counts.sum()),
        num_special_tokens=len(always),
        coverage=vocab_map.measure_coverage(counts),
        coverage_by_size=compare_sizes(counts, always, vocab_map.draft_vocab_size),
        probability_mass=mass,
        d2t_path=d2t_path,
        t2d_path=t2d_path,
        token_freq_path=token_freq_path,
    )


def _measures_mass(settings: VocabularySettings) -> bool:
    return bool(settings.mass_samples and settings.verifier_name_or_path)


def read_vocab_size(settings: VocabularySettings) -> int:
    """Return the number of rows of the verifier's embedding, or the size in the settings."""
    if settings.target_vocab_size is not None:
        return settings.target_vocab_size
    assert settings.verifier_name_or_path is not None, "the settings require one of the two"
    # Without a verifier, transformers is not imported: it takes a second to start.
    from speculators_cli.core.models.verifier_files import VerifierFiles

    return VerifierFiles(settings.verifier_name_or_path).read_vocab_size()


def choose_special_ids(
    settings: VocabularySettings, vocab_size: int, progress: Progress
) -> frozenset[int]:
    """Find the tokens to keep regardless of their count."""
    name = settings.verifier_name_or_path
    if not settings.keep_special:
        return frozenset()
    if name is None:
        progress.warn(
            "Special tokens are unknown without a verifier: they are kept by count only",
            hint="Pass `--verifier-name-or-path` instead of `--target-vocab-size`",
        )
        return frozenset()
    from speculators_cli.core.models.special_tokens import find_special_ids
    from speculators_cli.core.models.verifier_files import VerifierFiles

    files = VerifierFiles(name)
    ids, problem = find_special_ids(files, trust_remote_code=settings.trust_remote_code)
    if problem is not None:
        progress.warn(
            f"{problem.message}; the control tokens of its chat template are kept by count only",
            hint=problem.hint,
        )
    return frozenset(i for i in ids if 0 <= i < vocab_size)


def count(
    settings: BuildVocabMapSettings, vocab_size: int, progress: Progress
) -> tuple[SampleSource | None, NDArray[np.int64]]:
    """Count all tokens, [vocab], and open the samples, unless counts are read from files."""
    source = settings.counts
    if source.token_freq_path:
        return None, read_token_freq(source.token_freq_path, vocab_size)
    counts = TokenCounts(vocab_size, all_tokens=source.all_tokens)
    if choose_capture("auto", source.folders) == "online":
        shape = StatesShape(hidden_size=0, layer_ids=())
        tokens = read_tokens(
            source.folders, shape=shape, alignment=NEXT_TOKEN, progress=progress,
            on_tokens=counts.add,
        )  # fmt: skip
        return tokens, counts.total()
    samples = read_folders(
        source.folders,
        data_format=source.data_format,
        version=source.data_format_version,
        index_file=None,
        max_bad_samples=source.max_bad_samples,
        progress=progress,
        on_tokens=counts.add,
    )
    return samples, counts.total()


def compare_sizes(
    counts: NDArray[np.int64], always: Collection[int], chosen_size: int
) -> dict[int, float]:
    """Return the coverage of common sizes below the verifier's, and of the chosen one."""
    sizes = {size for size in COMPARED_SIZES if len(always) <= size < len(counts)} | {chosen_size}
    return {
        size: VocabMap.choose(counts, size, always=always).measure_coverage(counts)
        for size in sorted(sizes)
    }


def measure_mass(
    samples: SampleSource, settings: VocabularySettings, vocab_map: VocabMap, progress: Progress
) -> float | None:
    """Measure the verifier's mean probability within the draft vocabulary at supervised tokens.

    A draft token is accepted with probability sum(min(p, q)) (Leviathan et al., arXiv 2211.17192),
    so this bounds the acceptance of any draft over this vocabulary when sampling. Measured on a few
    samples, drawn with a seed; None if they have no supervised tokens.
    """
    from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
    from speculators_cli.core.models.verifier_files import VerifierFiles

    name = settings.verifier_name_or_path
    assert name is not None, "called only with a verifier"
    files = VerifierFiles(name)
    config = read_verifier_config(files, trust_remote_code=settings.trust_remote_code)
    if samples.hidden_size != config.hidden_size:
        raise DataError(
            f"The samples have hidden size {samples.hidden_size:,}, verifier `{name}` has "
            f"{config.hidden_size:,}",
            hint="Pass the verifier that the samples were captured from",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verifier = load_frozen_verifier(files, config, progress=progress).to(device)
    drawn = np.random.default_rng(0).permutation(len(samples))[: settings.mass_samples]
    masses = []
    with progress.task("Measuring probabilities", len(drawn)) as task:
        for sample_id in drawn.tolist():
            masses.append(sample_mass(samples, sample_id, verifier, vocab_map))
            task.advance()
    mass = torch.cat(masses)
    return float(mass.mean()) if len(mass) else None


@torch.no_grad()
def sample_mass(
    samples: SampleSource, sample_id: int, verifier: "FrozenVerifier", vocab_map: VocabMap
) -> torch.Tensor:
    """Return the probability within the draft vocabulary at some positions; [positions]."""
    from speculators_cli.core.models.agreement import find_scored, spread

    sample = samples.read(sample_id)
    # The distribution at position i is over the token after it.
    positions = spread(find_scored(sample))
    states = sample.last_hidden_states[positions].float().to(verifier.head.device)
    is_normed = torch.full((len(states),), sample.is_normed, device=states.device)
    normed = verifier.normed(states, is_normed)
    probabilities = verifier.logits(normed, verifier.head).softmax(-1)
    return probabilities[:, vocab_map.t2d.to(states.device)].sum(-1).cpu()

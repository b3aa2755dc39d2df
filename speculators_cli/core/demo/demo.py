"""The demo: capture, choose a vocabulary, train, draft and verify, on the embedded verifier.

Each stage is the package's ordinary code; only the inputs are specific to the demo.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.capture.generate import generate_data
from speculators_cli.core.capture.report import GenerationReport
from speculators_cli.core.data.data_config import default_layer_ids
from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.data.token_counts import TokenCounts
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.demo.demo_folder import CHECKPOINTS, DemoFolder
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.examples import mark_answer
from speculators_cli.core.evaluation.measurement import Measurement, Work, answer_alone, measure
from speculators_cli.core.evaluation.verifier import LoadedVerifier, load_verifier
from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.core.training.run_end import error_record, recording_end
from speculators_cli.settings.demo import DemoSettings
from speculators_cli.settings.generate_data import GenerateDataSettings
from speculators_cli.settings.train import TrainSettings

VERIFIER_DIR = Path(__file__).parent / "verifier"
PROMPTS_FILE = Path(__file__).parent / "prompts.jsonl"
NUM_LAYERS = 8  # of the embedded verifier
NUM_EVALUATION_PROMPTS = 24  # the first ones; no samples are captured from them
MAX_NEW_TOKENS = 96
DRAFT_VOCAB_SIZE = 1024
NUM_DRAFT_TOKENS = 3
MIN_ACCEPTANCE_LENGTH = {"eagle3": 2.0}
MIN_OF_OTHERS = 1.5  # blocks need more data than the demo has
# Sections of `train` that differ between algorithms; all drafts propose three tokens.
TRAINING: dict[str, dict[str, Any]] = {
    "eagle3": {"eagle3": {"ttt_step_loss_decay": 0.6}},
    "peagle": {
        "draft": {"num_layers": 2},
        "peagle": {"ttt_steps": NUM_DRAFT_TOKENS, "ttt_step_loss_decay": 0.6},
    },
    "dflash": {
        "draft": {"num_layers": 3},
        "dflash": {"block_size": NUM_DRAFT_TOKENS + 1},
        "optimizer": {"lr": 1e-3},
        "run": {"epochs": 6},
    },
    "dspark": {
        "draft": {"num_layers": 3},
        "dspark": {"block_size": NUM_DRAFT_TOKENS, "markov_rank": 64},
        "optimizer": {"lr": 1e-3},
        "run": {"epochs": 6},
    },
}


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo."""

    algorithm: str
    output_dir: Path
    captured: GenerationReport
    training: TrainReport
    untrained: Measurement
    trained: Measurement
    sample_prompt: str
    sample: tuple[tuple[str, bool], ...]  # text of an answer, and whether it was drafted
    duration_seconds: float

    @property
    def is_lossless(self) -> bool:
        """Whether every answer, before and after training, equals the verifier's own."""
        return self.trained.is_lossless and self.untrained.is_lossless

    def to_json(self) -> dict[str, Any]:
        """Return the figures for `--json`."""
        return {
            "algorithm": self.algorithm,
            "acceptance_length": self.trained.acceptance_length,
            "acceptance_rates": self.trained.acceptance_rates,
            "untrained_acceptance_length": self.untrained.acceptance_length,
            "untrained_acceptance_rates": self.untrained.acceptance_rates,
            "lossless": self.is_lossless,
            "num_samples": self.captured.num_samples,
            "num_passes": self.trained.num_passes,
            "duration_seconds": self.duration_seconds,
            "checkpoint": str(self.training.best_checkpoint),
        }


def run_demo(settings: DemoSettings, *, progress: Progress) -> DemoReport:
    """Run all stages.

    Raises:
        SettingsError: The output folder cannot be written, or has files that are not the demo's.
    """
    folder = DemoFolder(settings.run.output_dir)

    def write(error: SpeculatorsError) -> None:
        folder.write_result(error_record(error))

    with recording_end(write):
        return _run_stages(settings, folder, progress)


def _run_stages(settings: DemoSettings, folder: DemoFolder, progress: Progress) -> DemoReport:
    started_at = time.perf_counter()
    algorithm = ALGORITHMS[settings.run.algorithm]
    output_dir, seed = settings.run.output_dir, settings.run.seed
    # An ordinary folder of samples, so that other commands can be tried on it afterwards.
    with folder.placing("verifier") as place:
        shutil.copytree(VERIFIER_DIR, place / "verifier")
    name = str(output_dir / "verifier")
    layer_ids = default_layer_ids(NUM_LAYERS, algorithm.num_aux_layers)
    verifier = load_verifier(VerifierFiles(name), layer_ids, dtype=torch.float32)
    texts = read_prompts()
    prompts = [Prompt(verifier.encode(text), seed) for text in texts[:NUM_EVALUATION_PROMPTS]]

    num_prompts = len(texts) - NUM_EVALUATION_PROMPTS
    progress.info(f"1/4 Generate data: the verifier answers {num_prompts:,} prompts")
    with folder.placing("prompts.jsonl") as place:
        write_prompts(texts[NUM_EVALUATION_PROMPTS:], place / "prompts.jsonl")
    with folder.placing("data") as place:
        settings_of_data = generate_settings(settings, place / "data")
        captured = generate_data(settings_of_data, progress=progress)
    assert captured is not None, "the demo is one process"
    progress.info(
        f"    {captured.num_samples:,} samples, {captured.num_tokens:,} tokens, "
        f"{captured.num_supervised_tokens:,} of them supervised"
    )
    progress.info("2/4 Draft vocabulary: the most frequent tokens of the answers")
    with folder.placing("d2t.npy", "t2d.npy") as place:
        coverage = choose_vocabulary(verifier, output_dir / "data", place, progress)
    progress.info(f"    {DRAFT_VOCAB_SIZE:,} tokens cover {coverage:.1%} of the supervised tokens")
    progress.info(f"3/4 Train a draft: {algorithm.title}")
    settings_of_training = train_settings(settings)
    training = train(settings_of_training, progress=progress)
    folder.add_checkpoints()
    progress.info("4/4 Draft and verify on other prompts, before training and after")
    before, after = build_drafters(training, name, settings_of_training)
    work = Work(prompts, Sampling(MAX_NEW_TOKENS), NUM_EVALUATION_PROMPTS)
    own = answer_alone(verifier, work, progress).answers
    trained = measure(verifier, after, work, own, progress=progress)
    untrained = measure(verifier, before, work, own, progress=progress)
    shown = choose_answer(trained.answers)
    report = DemoReport(
        algorithm=algorithm.name,
        output_dir=output_dir,
        captured=captured,
        training=training,
        untrained=untrained,
        trained=trained,
        sample_prompt=texts[shown],
        sample=tuple(mark_answer(trained.answers[shown], verifier.tokens)),
        duration_seconds=time.perf_counter() - started_at,
    )
    folder.write_result(report.to_json())
    return report


def check_report(report: DemoReport) -> None:
    """Check that the demo had the expected results.

    Raises:
        SpeculatorsError: An answer differs from the verifier's own, or too little was accepted.
    """
    hint = "Report this with the output of the demo: it should pass on every machine"
    num_different = report.trained.num_different + report.untrained.num_different
    if num_different:
        raise SpeculatorsError(
            f"{num_different} drafted answers are not the verifier's own", hint=hint
        )
    expected = MIN_ACCEPTANCE_LENGTH.get(report.algorithm, MIN_OF_OTHERS)
    if report.trained.acceptance_length < expected:
        raise SpeculatorsError(
            f"The draft reached acceptance length {report.trained.acceptance_length:.2f}, "
            f"expected {expected:.1f}",
            hint=hint,
        )


def read_prompts() -> list[str]:
    """Read the prompts: first halves of standard library functions that were held out."""
    lines = PROMPTS_FILE.read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def write_prompts(texts: Sequence[str], file: Path) -> None:
    """Write prompts as JSON lines."""
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    file.write_text("".join(lines), "utf-8")


def generate_settings(settings: DemoSettings, data_dir: Path) -> GenerateDataSettings:
    """Return the settings of the demo's capture, as parsed by `speculators generate-data`."""
    run = settings.run
    return GenerateDataSettings.model_validate(
        {
            "input": {"prompts": str(run.output_dir / "prompts.jsonl"), "output_dir": data_dir},
            "verifier": {
                "verifier_name_or_path": str(run.output_dir / "verifier"),
                "algorithm": run.algorithm,
            },
            "tokens": {"regenerate": True, "max_new_tokens": MAX_NEW_TOKENS, "seed": run.seed},
            "engine": {"device": "cpu"},
        }
    )


def choose_vocabulary(
    verifier: LoadedVerifier, data_dir: Path, output_dir: Path, progress: Progress
) -> float:
    """Write d2t and t2d; return the fraction of supervised tokens they cover."""
    token_counts = TokenCounts(verifier.tokens.vocab_size)
    read_folders(
        [data_dir],
        version=1,
        index_file=None,
        max_bad_samples=0,
        progress=progress,
        on_tokens=token_counts.add,
    )
    counts = token_counts.total()
    vocab_map = VocabMap.choose(counts, DRAFT_VOCAB_SIZE, always=verifier.tokens.end_ids)
    vocab_map.save(output_dir / "d2t.npy", output_dir / "t2d.npy")
    return vocab_map.measure_coverage(counts)


def train_settings(settings: DemoSettings) -> TrainSettings:
    """Return the settings of the demo's training run, as parsed by `speculators train`."""
    output_dir, own = settings.run.output_dir, TRAINING.get(settings.run.algorithm, {})
    sections: dict[str, dict[str, Any]] = {
        "draft": {
            "algorithm": settings.run.algorithm,
            "verifier_name_or_path": str(output_dir / "verifier"),
            "d2t_path": output_dir / "d2t.npy",
            "t2d_path": output_dir / "t2d.npy",
        },
        "data": {"data_path": (output_dir / "data",), "total_seq_len": 512},
        "run": {
            "save_path": output_dir / CHECKPOINTS,
            "epochs": 3,
            "seed": settings.run.seed,
            "log_every_steps": 50,
        },
        "optimizer": {"lr": 4e-3},
        "checkpoints": {"keep_checkpoints": 1},
        "distributed": {"device": "cpu"},
    }
    for section, values in own.items():
        sections[section] = sections.get(section, {}) | values
    return TrainSettings.model_validate(sections)


def build_drafters(
    training: TrainReport, verifier_name: str, settings: TrainSettings
) -> tuple[Drafter, Drafter]:
    """Build drafters of the draft before training and of the best checkpoint."""
    assert training.best_checkpoint is not None, "the demo's run saves and validates"
    after = read_draft(str(training.best_checkpoint), Overrides(), flag="CHECKPOINT")
    files = VerifierFiles(verifier_name)
    config = read_verifier_config(files, trust_remote_code=False)
    verifier = load_frozen_verifier(files, config)
    untrained = after.algorithm.build(
        after.config,
        verifier,
        after.vocab_map,
        settings.algorithm_settings,
        use_fast_kernels=False,
        seed=settings.run.seed,
    )
    before = replace(after, weights=dict(untrained.named_parameters()))
    return (
        before.build_drafter(verifier.embedding, num_draft_tokens=NUM_DRAFT_TOKENS),
        after.build_drafter(verifier.embedding, num_draft_tokens=NUM_DRAFT_TOKENS),
    )


def choose_answer(answers: Sequence[Answer]) -> int:
    """Return the answer to show: the one with median acceptance among those of maximum length."""
    typical = sorted(len(answer.tokens) for answer in answers)[len(answers) // 2]
    long_ones = [i for i, answer in enumerate(answers) if len(answer.tokens) >= typical]
    by_acceptance = sorted(long_ones, key=lambda i: sum(answers[i].is_accepted))
    return by_acceptance[len(by_acceptance) // 2]

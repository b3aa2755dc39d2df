"""run_demo(): capture, choose a vocabulary, train, draft and verify, on the embedded verifier.

Each stage is what its command runs; only the inputs are the demo's own.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speculators_cli.core.capture.capture import CaptureReport, capture
from speculators_cli.core.data.data_config import default_layer_ids
from speculators_cli.core.data.dataset import read_dataset
from speculators_cli.core.data.vocab_map import VocabMap, count_tokens
from speculators_cli.core.errors import SettingsError, SpeculatorsError
from speculators_cli.core.evaluation.draft_and_verify import EvaluationReport, evaluate
from speculators_cli.core.files import replacing
from speculators_cli.core.models.checkpoint import read_checkpoint
from speculators_cli.core.models.drafter import Drafter
from speculators_cli.core.models.eagle3 import load_draft
from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_model import VerifierModel
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.demo import DemoSettings
from speculators_cli.settings.train import TrainSettings

VERIFIER_DIR = Path(__file__).parent / "verifier"
PROMPTS_FILE = Path(__file__).parent / "prompts.jsonl"
NUM_LAYERS = 8  # of the embedded verifier
NUM_EVALUATION_PROMPTS = 24  # the first ones; no sample is captured from them
MAX_NEW_TOKENS = 96
DRAFT_VOCAB_SIZE = 1024
NUM_DRAFT_TOKENS = 3
MIN_ACCEPTANCE_LENGTH = 2.0
RESULT_NAME = "demo.json"  # its presence says that the folder is a demo's
OWN_NAMES = ("data", "checkpoints", "d2t.npy", "t2d.npy", RESULT_NAME)


@dataclass(frozen=True)
class DemoReport:
    """What the demo found."""

    capture: CaptureReport
    vocab_coverage: float  # share of supervised tokens that the draft vocabulary holds
    training: TrainReport
    untrained: EvaluationReport
    trained: EvaluationReport
    sample: tuple[tuple[str, bool], ...]  # text of an answer, and whether the draft wrote it
    sample_prompt: str
    duration_seconds: float

    @property
    def is_lossless(self) -> bool:
        """Whether every answer, before and after training, was the verifier's own."""
        return self.trained.is_lossless and self.untrained.is_lossless

    def to_json(self) -> dict[str, Any]:
        """The figures, as `--json` shows them."""
        return {
            "acceptance_length": self.trained.acceptance_length,
            "acceptance_rates": self.trained.acceptance_rates,
            "untrained_acceptance_length": self.untrained.acceptance_length,
            "untrained_acceptance_rates": self.untrained.acceptance_rates,
            "lossless": self.is_lossless,
            "duration_seconds": self.duration_seconds,
            "checkpoint": str(self.training.best_checkpoint),
            "num_samples": self.capture.num_samples,
            "num_passes": self.trained.num_passes,
        }


def run_demo(settings: DemoSettings, *, progress: Progress) -> DemoReport:
    """Run all stages.

    Raises:
        SettingsError: The output folder holds what the demo did not make.
        SpeculatorsError: The draft missed its target, or an answer was not the verifier's own.
    """
    started_at = time.perf_counter()
    output_dir = settings.run.output_dir
    prepare(output_dir)
    verifier = VerifierModel(str(VERIFIER_DIR), default_layer_ids(NUM_LAYERS), dtype=torch.float32)
    prompts = [
        verifier.tokenizer(f"{verifier.tokenizer.bos_token}{text}") for text in read_prompts()
    ]
    prompts = [prompt["input_ids"] for prompt in prompts]
    to_evaluate, to_capture = prompts[:NUM_EVALUATION_PROMPTS], prompts[NUM_EVALUATION_PROMPTS:]

    progress.info(f"1/4 The verifier answers {len(to_capture):,} prompts; its states are kept")
    captured = capture(
        verifier,
        to_capture,
        output_dir / "data",
        verifier_name=VERIFIER_DIR.name,
        max_new_tokens=MAX_NEW_TOKENS,
        progress=progress,
    )
    progress.info(
        f"    {captured.num_samples:,} samples, {captured.num_tokens:,} tokens, "
        f"{captured.num_supervised_tokens:,} of them to learn from"
    )
    coverage = choose_vocabulary(output_dir, progress)
    progress.info(
        f"2/4 The draft keeps the {DRAFT_VOCAB_SIZE:,} most frequent tokens: {coverage:.1%} of all"
    )
    progress.info("3/4 Training an EAGLE-3 draft")
    training = train(train_settings(output_dir, settings.run.seed), progress=progress)
    progress.info("4/4 Draft and verify on prompts that nothing was captured from")
    untrained = evaluate_draft(verifier, training, to_evaluate, settings.run.seed, progress)
    trained = evaluate_draft(verifier, training, to_evaluate, None, progress)
    shown = max(range(len(to_evaluate)), key=lambda i: sum(trained.answers[i].is_accepted))
    report = DemoReport(
        capture=captured,
        vocab_coverage=coverage,
        training=training,
        untrained=untrained,
        trained=trained,
        sample=tuple(
            (verifier.tokenizer.decode([token]), is_accepted)
            for token, is_accepted in zip(
                trained.answers[shown].tokens, trained.answers[shown].is_accepted, strict=True
            )
            if token not in verifier.end_ids
        ),
        sample_prompt=read_prompts()[shown],
        duration_seconds=time.perf_counter() - started_at,
    )
    with replacing(output_dir / RESULT_NAME) as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
    return report


def check_report(report: DemoReport) -> None:
    """Refuse a demo that did not show what it is there to show.

    Raises:
        SpeculatorsError: An answer differs from the verifier's own, or too little was accepted.
    """
    hint = "Report this with the output of the demo: it should hold on every machine"
    num_different = report.trained.num_different + report.untrained.num_different
    if num_different:
        raise SpeculatorsError(
            f"{num_different} drafted answers are not the verifier's own", hint=hint
        )
    if report.trained.acceptance_length < MIN_ACCEPTANCE_LENGTH:
        raise SpeculatorsError(
            f"The draft reached acceptance length {report.trained.acceptance_length:.2f}, "
            f"expected {MIN_ACCEPTANCE_LENGTH:.1f}",
            hint=hint,
        )


def prepare(output_dir: Path) -> None:
    """Empty the output folder of an earlier demo, or make it; everything else is left alone."""
    if output_dir.exists():
        if not output_dir.is_dir():
            raise SettingsError(
                f"`--output-dir`: `{output_dir}` is not a folder", hint="Name a folder"
            )
        is_own = (output_dir / RESULT_NAME).is_file()
        if not is_own and any(output_dir.iterdir()):
            raise SettingsError(
                f"`--output-dir`: `{output_dir}` holds files that the demo did not make",
                hint="Name another folder",
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in OWN_NAMES:
        path = output_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # A demo that is stopped half-way can be run again.
    (output_dir / RESULT_NAME).write_text("{}\n", "utf-8")


def read_prompts() -> list[str]:
    """Heads of functions of the standard library that the verifier was not trained on."""
    lines = PROMPTS_FILE.read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def choose_vocabulary(output_dir: Path, progress: Progress) -> float:
    """Write d2t and t2d; returns the share of supervised tokens they cover."""
    samples = read_dataset(
        [output_dir / "data"], version=1, index_file=None, max_bad_samples=0, progress=progress
    )
    vocab_size = VerifierFiles(str(VERIFIER_DIR)).read_vocab_size(is_tied=True)
    counts = count_tokens(samples, vocab_size)
    vocab_map = VocabMap.choose(counts, DRAFT_VOCAB_SIZE, always=(0, 1))
    vocab_map.save(output_dir / "d2t.npy", output_dir / "t2d.npy")
    return float(counts[np.asarray(vocab_map.t2d)].sum() / counts.sum())


def train_settings(output_dir: Path, seed: int) -> TrainSettings:
    """The settings `speculators train` would get from the command line that the demo shows."""
    return TrainSettings.model_validate(
        {
            "draft": {
                "verifier_name_or_path": str(VERIFIER_DIR),
                "d2t_path": output_dir / "d2t.npy",
                "t2d_path": output_dir / "t2d.npy",
            },
            "data": {"data_path": (output_dir / "data",), "total_seq_len": 2048},
            "run": {
                "save_path": output_dir / "checkpoints",
                "epochs": 8,
                "seed": seed,
                "log_every_steps": 25,
            },
            "optimizer": {"lr": 3e-3},
            "checkpoints": {"keep_checkpoints": 1},
            "distributed": {"device": "cpu"},
        }
    )


def evaluate_draft(
    verifier: VerifierModel,
    training: TrainReport,
    prompts: list[list[int]],
    untrained_seed: int | None,
    progress: Progress,
) -> EvaluationReport:
    """Draft and verify with the best checkpoint, or with its weights as they were at step 0."""
    assert training.best_checkpoint is not None, "the demo's run saves and validates"
    checkpoint = read_checkpoint(training.best_checkpoint)
    assert checkpoint is not None, "it was just saved"
    files = VerifierFiles(str(VERIFIER_DIR))
    config = read_verifier_config(files, trust_remote_code=False)
    draft = load_draft(checkpoint, load_frozen_verifier(files, config))
    if untrained_seed is not None:
        draft.initialise(untrained_seed)
    drafter = Drafter(draft, NUM_DRAFT_TOKENS)
    return evaluate(verifier, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS, progress=progress)

"""Train draft models for speculative decoding, as a library.

`docs/reference/library.md` has an example. A name is imported when it is first used, so that the
command line can import this package without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculators_cli.core.algorithms.overrides import Overrides
    from speculators_cli.core.bench.bench import BenchReport, bench
    from speculators_cli.core.capture.generate import generate_data
    from speculators_cli.core.capture.report import GenerationReport
    from speculators_cli.core.drafts.trained_draft import TrainedDraft, read_draft
    from speculators_cli.core.errors import (
        CheckpointError,
        DataError,
        DivergedError,
        ExportError,
        MachineError,
        SettingsError,
        SpeculatorsError,
        StoppedError,
    )
    from speculators_cli.core.evaluated_training import train
    from speculators_cli.core.evaluation.evaluate import evaluate
    from speculators_cli.core.evaluation.report import EvaluationReport
    from speculators_cli.core.evaluation.served import evaluate_served
    from speculators_cli.core.evaluation.served_report import ServedReport
    from speculators_cli.core.export.export import ExportReport, export
    from speculators_cli.core.models.verifier import (
        FrozenVerifier,
        load_frozen_verifier,
        read_verifier_config,
    )
    from speculators_cli.core.models.verifier_files import VerifierFiles
    from speculators_cli.core.preparation.conversion import ConversionReport, convert_v0
    from speculators_cli.core.preparation.inspection import inspect_data
    from speculators_cli.core.preparation.inspection_report import InspectionReport
    from speculators_cli.core.preparation.vocabulary import VocabMapReport, build_vocab_map
    from speculators_cli.core.progress import (
        Progress,
        SilentProgress,
        StepReport,
        ValidationReport,
    )
    from speculators_cli.core.training.plan import TrainPlan, plan
    from speculators_cli.core.training.report import TrainReport
    from speculators_cli.settings.bench import BenchSettings
    from speculators_cli.settings.build_vocab_map import BuildVocabMapSettings
    from speculators_cli.settings.convert_v0 import ConvertV0Settings
    from speculators_cli.settings.evaluate import EvaluateSettings
    from speculators_cli.settings.export import ExportSettings
    from speculators_cli.settings.generate_data import GenerateDataSettings
    from speculators_cli.settings.inspect_data import InspectDataSettings
    from speculators_cli.settings.loading import load_settings
    from speculators_cli.settings.train import TrainSettings

__version__ = "0.1.0"

__all__ = [
    "BenchReport",
    "BenchSettings",
    "BuildVocabMapSettings",
    "CheckpointError",
    "ConversionReport",
    "ConvertV0Settings",
    "DataError",
    "DivergedError",
    "EvaluateSettings",
    "EvaluationReport",
    "ExportError",
    "ExportReport",
    "ExportSettings",
    "FrozenVerifier",
    "GenerateDataSettings",
    "GenerationReport",
    "InspectDataSettings",
    "InspectionReport",
    "MachineError",
    "Overrides",
    "Progress",
    "ServedReport",
    "SettingsError",
    "SilentProgress",
    "SpeculatorsError",
    "StepReport",
    "StoppedError",
    "TrainPlan",
    "TrainReport",
    "TrainSettings",
    "TrainedDraft",
    "ValidationReport",
    "VerifierFiles",
    "VocabMapReport",
    "bench",
    "build_vocab_map",
    "convert_v0",
    "evaluate",
    "evaluate_served",
    "export",
    "generate_data",
    "inspect_data",
    "load_frozen_verifier",
    "load_settings",
    "plan",
    "read_draft",
    "read_verifier_config",
    "train",
]

_HOMES = {
    "core.algorithms.overrides": ("Overrides",),
    "core.bench.bench": ("BenchReport", "bench"),
    "core.capture.generate": ("generate_data",),
    "core.capture.report": ("GenerationReport",),
    "core.drafts.trained_draft": ("TrainedDraft", "read_draft"),
    "core.errors": (
        "CheckpointError",
        "DataError",
        "DivergedError",
        "ExportError",
        "MachineError",
        "SettingsError",
        "SpeculatorsError",
        "StoppedError",
    ),
    "core.evaluated_training": ("train",),
    "core.evaluation.evaluate": ("evaluate",),
    "core.evaluation.report": ("EvaluationReport",),
    "core.evaluation.served": ("evaluate_served",),
    "core.evaluation.served_report": ("ServedReport",),
    "core.export.export": ("ExportReport", "export"),
    "core.models.verifier": ("FrozenVerifier", "load_frozen_verifier", "read_verifier_config"),
    "core.models.verifier_files": ("VerifierFiles",),
    "core.preparation.conversion": ("ConversionReport", "convert_v0"),
    "core.preparation.inspection": ("inspect_data",),
    "core.preparation.inspection_report": ("InspectionReport",),
    "core.preparation.vocabulary": ("VocabMapReport", "build_vocab_map"),
    "core.progress": ("Progress", "SilentProgress", "StepReport", "ValidationReport"),
    "core.training.plan": ("TrainPlan", "plan"),
    "core.training.report": ("TrainReport",),
    "settings.bench": ("BenchSettings",),
    "settings.build_vocab_map": ("BuildVocabMapSettings",),
    "settings.convert_v0": ("ConvertV0Settings",),
    "settings.evaluate": ("EvaluateSettings",),
    "settings.export": ("ExportSettings",),
    "settings.generate_data": ("GenerateDataSettings",),
    "settings.inspect_data": ("InspectDataSettings",),
    "settings.loading": ("load_settings",),
    "settings.train": ("TrainSettings",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # for a type checker, there are the names above and no others

    def __getattr__(name: str) -> Any:
        """Import a name of the library when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

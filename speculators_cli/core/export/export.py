"""export(): write a trained draft as a verified folder for a serving engine."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.data_config import LayerIds, warn_of_assumed
from speculators_cli.core.drafts.checkpoint_reader import hash_file
from speculators_cli.core.drafts.trained_draft import ASSUMED_HINT, EMBEDDING, read_draft
from speculators_cli.core.errors import MachineError
from speculators_cli.core.export.checks import check_can_run, check_place, check_verifier
from speculators_cli.core.export.licence import CARD_NAME, read_licence
from speculators_cli.core.export.model_card import (
    FILES,
    PROVENANCE_NAME,
    build_card,
    build_provenance,
)
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.export.targets.target import EngineAdvice
from speculators_cli.core.export.verification import Verification, has_untrained_norms, verify
from speculators_cli.core.export.weights import cast_tensors, write_weights
from speculators_cli.core.files import disk_error, write_json
from speculators_cli.core.models.repo_files import CONFIG_NAME
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_shape import read_verifier_shape
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.scratch import replacing_folder
from speculators_cli.settings.export import ExportSettings

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportReport:
    """What was exported."""

    output_dir: Path
    source: str  # the checkpoint that was chosen
    target: str
    dtype: str
    verifier: str
    num_parameters: int
    num_bytes: int  # of the weights
    has_embedding: bool
    verification: Verification | None  # None: `--no-verify`
    serve_command: str | None  # None: the target has no command
    advice: EngineAdvice | None  # None: no release was tested
    layer_ids: LayerIds
    is_verifier_checked: bool  # its sizes match the draft
    pushed_to: str | None

    def to_json(self) -> dict[str, Any]:
        """The content of `--json`."""
        checked = self.verification
        return {
            "output_dir": str(self.output_dir),
            "source": self.source,
            "target": self.target,
            "dtype": self.dtype,
            "verifier": self.verifier,
            "num_parameters": self.num_parameters,
            "num_bytes": self.num_bytes,
            "has_embedding": self.has_embedding,
            "is_verified": checked is not None,
            "logit_error": checked.logit_error if checked else None,
            "argmax_agreement": checked.argmax_agreement if checked else None,
            "target_layer_ids": list(self.layer_ids.ids),
            "are_layer_ids_assumed": self.layer_ids.is_assumed,
            "is_verifier_checked": self.is_verifier_checked,
            "serve_command": self.serve_command,
            "oldest_vllm": self.advice.oldest if self.advice else None,
            "pushed_to": self.pushed_to,
        }


def export(settings: ExportSettings, *, progress: Progress = SILENT) -> ExportReport:
    """Export a trained draft.

    Raises:
        SettingsError: The output folder or the verifier cannot be used; nothing was written.
        CheckpointError: The checkpoint is not a complete draft.
        ExportError: The target cannot run this draft, or the written one differs from it.
        MachineError: The disk or the hub failed.
    """
    given, chosen = settings.source, settings.export
    check_place(chosen.output_dir, Path(given.checkpoint), overwrite=chosen.overwrite)
    known = Overrides(
        verifier_name_or_path=given.verifier_name_or_path,
        target_layer_ids=given.target_layer_ids,
        read_verifier=lambda name: read_verifier_shape(
            VerifierFiles(name), trust_remote_code=given.trust_remote_code
        ),
    )
    source = read_draft(given.checkpoint, known, flag="CHECKPOINT")
    layer_ids = LayerIds(
        source.config.target_layer_ids, is_assumed=source.config.are_layer_ids_assumed
    )
    warn_of_assumed(layer_ids, progress, whose=f"`{source.name}` has")
    if source.assumption is not None:
        progress.warn(source.assumption, hint=ASSUMED_HINT)
    num_tokens = chosen.num_speculative_tokens or source.config.num_draft_tokens
    served = replace(
        source.config.with_num_draft_tokens(num_tokens),
        verifier_name_or_path=absolute(source.config.verifier_name_or_path),
    )
    target = TARGETS[chosen.target]
    check_can_run(source, served, target)
    is_verifier_checked = check_verifier(settings, source, progress)
    if has_untrained_norms(source.weights):
        progress.warn(
            f"All norm weights of `{source.name}` are exactly 1.0, as before training: rounding "
            "may have discarded their updates"
        )
    risks = (
        target.find_serving_risk(served),
        source.algorithm.find_length_risk(source.config, num_tokens),
    )
    for risk in filter(None, risks):
        progress.warn(risk)
    tensors = cast_tensors(source, DTYPES[chosen.dtype], with_embedding=chosen.embeddings)
    form, advice = target.format_of(served), target.advise(served)
    verification = None
    provenance = build_provenance(source, settings)
    licence = (
        {"license": chosen.license}
        if chosen.license is not None
        else read_licence(served.verifier_name_or_path, progress)
    )
    try:
        with replacing_folder(chosen.output_dir, flag="--output-dir") as folder:
            # Again, because another export may have finished here since.
            check_place(chosen.output_dir, Path(given.checkpoint), overwrite=chosen.overwrite)
            config_file = folder / CONFIG_NAME
            write_json(target.build_config(served, chosen.dtype), config_file)
            num_bytes = write_weights(tensors, config_file, form, chosen.max_shard_size)
            if chosen.verify:
                verification = verify(
                    folder, source, served, target=chosen.target, dtype=DTYPES[chosen.dtype]
                )
            command = target.serve_command(served, chosen.output_dir)
            card = build_card(source, served, settings, target, advice, licence)
            (folder / CARD_NAME).write_text(card, "utf-8")
            files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
            write_json({**provenance, FILES: files}, folder / PROVENANCE_NAME)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise disk_error(chosen.output_dir, str(reason)) from None
    if chosen.push_to_hub is not None:
        push(chosen.output_dir, chosen.push_to_hub)
    return ExportReport(
        output_dir=chosen.output_dir,
        source=source.name,
        target=chosen.target,
        dtype=chosen.dtype,
        verifier=served.verifier_name_or_path,
        num_parameters=sum(x.numel() for x in tensors.values() if x.is_floating_point()),
        num_bytes=num_bytes,
        has_embedding=EMBEDDING in tensors,
        verification=verification,
        serve_command=command,
        advice=advice,
        layer_ids=layer_ids,
        is_verifier_checked=is_verifier_checked,
        pushed_to=chosen.push_to_hub,
    )


def absolute(verifier: str) -> str:
    """The absolute path of a folder, for servers started elsewhere; a hub id unchanged."""
    return str(Path(verifier).absolute()) if Path(verifier).is_dir() else verifier


def push(folder: Path, repo_id: str) -> None:
    """Upload a finished folder; a second call uploads only what is missing.

    Raises:
        MachineError: The upload failed; the folder is kept.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MachineError(
            f"`{folder}` is complete, but could not be uploaded to `{repo_id}`: {reason}",
            hint=f"Run `hf auth login`, then `hf upload {repo_id} {folder}`",
        ) from None

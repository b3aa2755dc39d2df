"""export(settings): a trained draft as a folder that a serving engine reads, checked and whole."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from speculators_cli.core.errors import ExportError, MachineError, SettingsError, SpeculatorsError
from speculators_cli.core.export.model_card import build_card, build_provenance
from speculators_cli.core.export.targets import TARGETS, Target, vllm_command
from speculators_cli.core.export.verification import (
    Verification,
    find_broken_values,
    has_untrained_gains,
    verify,
)
from speculators_cli.core.files import (
    check_free_space,
    check_output_dir,
    replacing_folder,
    write_json,
)
from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.draft_config import Given
from speculators_cli.core.models.draft_source import EMBEDDING, DraftSource, read_draft
from speculators_cli.core.models.repo_files import CONFIG_NAME, INDEX_NAME
from speculators_cli.core.models.verifier import (
    VerifierConfig,
    load_embedding,
    read_verifier_config,
)
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import Progress
from speculators_cli.settings.export import ExportSettings

CARD_NAME, PROVENANCE_NAME = "README.md", "provenance.json"
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
    verification: Verification | None  # None: not asked for
    serve_command: str | None  # None: how to serve it is the engine's matter
    is_verifier_checked: bool  # its sizes were read and fit
    pushed_to: str | None

    def to_json(self) -> dict[str, Any]:
        """The figures, as `--json` shows them."""
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
            "is_verifier_checked": self.is_verifier_checked,
            "serve_command": self.serve_command,
            "pushed_to": self.pushed_to,
        }


def export(settings: ExportSettings, *, progress: Progress) -> ExportReport:
    """Export a trained draft.

    Raises:
        SettingsError: The output folder or the verifier cannot be used; nothing was written.
        CheckpointError: The checkpoint is no whole EAGLE-3 draft.
        ExportError: The target cannot run this draft, or what was written is not it.
        MachineError: Disk or hub are in the way.
    """
    given, chosen = settings.source, settings.export
    check_place(chosen.output_dir, Path(given.checkpoint), overwrite=chosen.overwrite)
    known = Given(
        verifier_name_or_path=given.verifier_name_or_path,
        target_layer_ids=given.target_layer_ids,
        ask_verifier=lambda name: read_verifier_config(
            VerifierFiles(name), trust_remote_code=given.trust_remote_code
        ),
    )
    source = read_draft(given.checkpoint, known, flag="CHECKPOINT")
    num_tokens = chosen.num_speculative_tokens or source.config.ttt_steps
    served = replace(
        source.config,
        ttt_steps=num_tokens,
        verifier_name_or_path=absolute(source.config.verifier_name_or_path),
    )
    target = TARGETS[chosen.target]
    check_can_run(source, served, target)
    is_verifier_checked = check_verifier(settings, source, progress)
    if has_untrained_gains(source.weights):
        progress.warn(
            f"All norm gains of `{source.name}` are exactly 1.0, as before training: its training "
            "may have been lost to rounding"
        )
    tensors = cast_tensors(source, DTYPES[chosen.dtype], with_embedding=chosen.embeddings)
    verification = None
    provenance = build_provenance(source, settings)
    try:
        with replacing_folder(chosen.output_dir) as folder:
            config_file = folder / CONFIG_NAME
            write_json(target.build_config(served, chosen.dtype), config_file)
            num_bytes = write_weights(tensors, config_file, target, chosen.max_shard_size)
            write_json(provenance, folder / PROVENANCE_NAME)
            if chosen.verify:
                verification = verify(
                    folder, source, served, target=chosen.target, dtype=DTYPES[chosen.dtype]
                )
            command = serve_command(served, chosen.output_dir, chosen.target)
            card = build_card(source, served, settings, command)
            (folder / CARD_NAME).write_text(card, "utf-8")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MachineError(
            f"`{chosen.output_dir}` cannot be written: {reason}",
            hint="Make room on the disk, or choose another `--output-dir`",
        ) from None
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
        is_verifier_checked=is_verifier_checked,
        pushed_to=chosen.push_to_hub,
    )


def absolute(verifier: str) -> str:
    """A folder by its whole path, so that a server finds it from anywhere; a hub id as it is."""
    return str(Path(verifier).absolute()) if Path(verifier).is_dir() else verifier


def check_place(output_dir: Path, source: Path, *, overwrite: bool) -> None:
    """Check that the output folder is new, empty, or an export that may go.

    Raises:
        SettingsError: It is not.
    """
    check_output_dir(output_dir, flag="--output-dir")
    if output_dir.is_symlink():
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` is a link", hint="Name the folder it leads to"
        )
    resolved, read = output_dir.resolve(), source.resolve()
    if source.exists() and (resolved == read or resolved in read.parents):
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` holds the checkpoint", hint="Name another folder"
        )
    names = sorted(path.name for path in output_dir.iterdir()) if output_dir.exists() else []
    own = {CONFIG_NAME, CARD_NAME, PROVENANCE_NAME, INDEX_NAME}
    foreign = [x for x in names if x not in own and not x.endswith(".safetensors")]
    if foreign or (names and PROVENANCE_NAME not in names):
        name = foreign[0] if foreign else names[0]
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` holds `{name}`, which no export wrote",
            hint="Name another folder",
        )
    if names and not overwrite:
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` is not empty",
            hint="Pass `--overwrite` to replace the export in it, or name another folder",
        )


def check_can_run(source: DraftSource, served: Eagle3Config, target: Target) -> None:
    """Refuse a draft that the target's engine does not compute, or whose weights are broken.

    Raises:
        ExportError: It is one.
    """
    obstacles = target.find_obstacles(served)
    if obstacles:
        raise ExportError(
            "\n".join(
                [f"{target.engine} cannot run `{source.name}`", *(f"  {x}" for x in obstacles)]
            ),
            hint="Export it for vLLM with `--target vllm`",
        )
    broken = find_broken_values(source)
    if broken:
        raise ExportError(
            f"`{source.name}` has values that are not finite in `{broken[0]}`",
            hint="Export an earlier checkpoint of the run",
        )


def check_verifier(settings: ExportSettings, source: DraftSource, progress: Progress) -> bool:
    """Check sizes, layers and vocabulary against the verifier, where it can be read.

    Raises:
        ExportError: It is another verifier, or its embedding is not the draft's but would be used.
    """
    config, name = source.config, source.config.verifier_name_or_path
    leaves_out = not settings.export.embeddings and source.embedding is not None
    embedding = None
    try:
        files = VerifierFiles(name)
        verifier = read_verifier_config(files, trust_remote_code=settings.source.trust_remote_code)
        # Of the hub, it would be a download of gigabytes for one number.
        if files.is_local or leaves_out:
            embedding = load_embedding(files, verifier)
    except SpeculatorsError as error:
        progress.warn(
            f"Verifier `{name}` could not be read, so the draft was not checked against it",
            hint=error.hint,
        )
        return False
    sizes = [("hidden size", config.target_hidden_size, verifier.hidden_size)]
    if embedding is not None:
        sizes.append(("vocabulary", config.vocab_size, embedding.shape[0]))
    for word, found, expected in sizes:
        if found != expected:
            raise ExportError(
                f"`{source.name}` is for a verifier of {word} {found:,}, `{name}` has {expected:,}",
                hint="Name its own verifier with `--verifier-name-or-path`",
            )
    check_layers(source, verifier)
    if leaves_out and embedding is not None and not is_same(source.embedding, embedding):
        raise ExportError(
            f"The embedding of `{source.name}` is not that of verifier `{name}`",
            hint="Leave out `--without-embeddings`",
        )
    return True


def check_layers(source: DraftSource, verifier: VerifierConfig) -> None:
    """Refuse verifier layers that do not exist."""
    if source.config.target_layer_ids[-1] > verifier.num_layers:
        raise ExportError(
            f"`{source.name}` reads verifier layer {source.config.target_layer_ids[-1]}, "
            f"`{verifier.name_or_path}` has {verifier.num_layers}",
            hint="Name its own verifier with `--verifier-name-or-path`",
        )


def is_same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two embeddings are equal in the coarser of their types."""
    if one is None or one.shape != other.shape:
        return False
    dtype = min(one.dtype, other.dtype, key=lambda x: x.itemsize)
    return torch.equal(one.to(dtype), other.to(dtype))


def cast_tensors(
    source: DraftSource, dtype: torch.dtype, *, with_embedding: bool
) -> dict[str, Tensor]:
    """Everything that is written, under a checkpoint's names.

    Raises:
        ExportError: A value does not fit the type.
    """
    tensors = dict(source.weights)
    if with_embedding and source.embedding is not None:
        tensors[EMBEDDING] = source.embedding
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    too_large = [name for name, tensor in cast.items() if not tensor.isfinite().all()]
    if too_large:
        raise ExportError(
            f"`{too_large[0]}` of `{source.name}` does not fit {str(dtype).removeprefix('torch.')}",
            hint="Pass `--dtype bfloat16`, which has the range of float32",
        )
    if EMBEDDING not in cast and source.config.hidden_size != source.config.target_hidden_size:
        raise ExportError(
            f"`{source.name}` is narrower than its verifier, whose embedding it cannot share",
            hint="Leave out `--without-embeddings`",
        )
    if not source.vocab_map.is_full:
        cast |= {"d2t": source.vocab_map.d2t, "t2d": source.vocab_map.t2d}
    return cast


def write_weights(
    tensors: Mapping[str, Tensor], config_file: Path, target: Target, max_shard_size: str
) -> int:
    """Write the weights beside their config, in several files if large; returns their bytes."""
    folder = config_file.parent
    renamed = {target.rename(name): x.contiguous() for name, x in tensors.items()}
    needed = sum(x.nbytes for x in renamed.values())
    check_free_space(
        folder.parent,
        needed,
        what="the export",
        hint="Make room on the disk, or choose another `--output-dir`",
    )
    plan = split_torch_state_dict_into_shards(renamed, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: renamed[name] for name in names}, folder / file, {"format": "pt"})
        shutil.copymode(config_file, folder / file)  # safetensors keeps its files private
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(index, folder / INDEX_NAME)
    return needed


def serve_command(served: Eagle3Config, output_dir: Path, target: str) -> str | None:
    """The command that serves the verifier with this draft."""
    verifier = served.verifier_name_or_path
    if target == "sglang":
        return None
    if target == "vllm" and not Path(verifier).exists():
        return f"vllm serve {shlex.quote(str(output_dir))}"
    return vllm_command(verifier, str(output_dir), served.ttt_steps)


def push(folder: Path, repo_id: str) -> None:
    """Upload a finished folder; a second try uploads what is missing.

    Raises:
        MachineError: The hub cannot be reached, or refuses; the folder is kept.
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

"""Checks before anything is written: output folder, draft, verifier."""

from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import PRODUCER, DraftConfig
from speculators_cli.core.drafts.checkpoint_reader import hash_file
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.errors import ExportError, SettingsError, SpeculatorsError
from speculators_cli.core.export.licence import CARD_NAME
from speculators_cli.core.export.model_card import FILES, PROVENANCE_NAME
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.export.targets.target import Target
from speculators_cli.core.export.verification import find_broken_values
from speculators_cli.core.files import check_output_dir
from speculators_cli.core.models.repo_files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from speculators_cli.core.models.verifier import load_embedding
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_shape import VerifierShape, read_verifier_shape
from speculators_cli.core.progress import Progress
from speculators_cli.core.reading import UnreadableError, read_json_object
from speculators_cli.settings.export import ExportSettings


def check_place(output_dir: Path, source: Path, *, overwrite: bool) -> None:
    """Check that the output folder is new, empty, or an export that may go, as it was written.

    Raises:
        SettingsError: It cannot be used.
    """
    check_output_dir(output_dir, flag="--output-dir")
    if output_dir.is_symlink():
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` is a link",
            hint=f"Pass the target of the link: `{output_dir.resolve()}`",
        )
    resolved, read = output_dir.resolve(), source.resolve()
    if source.exists() and (resolved == read or resolved in read.parents):
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` holds the checkpoint", hint="Pass another folder"
        )
    paths = sorted(output_dir.iterdir()) if output_dir.exists() else []
    own = find_own_files(output_dir) if paths else {}
    for path in paths:
        if path.name not in own or path.is_symlink() or not path.is_file():
            raise SettingsError(
                f"`--output-dir`: `{output_dir}` holds `{path.name}`, which no export wrote",
                hint="Pass another folder",
            )
    if paths and not overwrite:
        raise SettingsError(
            f"`--output-dir`: `{output_dir}` is not empty",
            hint="Pass `--overwrite` to replace the export in it, or pass another folder",
        )
    for path in paths:
        if own[path.name] is not None and hash_file(path) != own[path.name]:
            raise SettingsError(
                f"`--output-dir`: `{path}` was changed since it was exported",
                hint="Move it elsewhere to keep it, or pass another folder",
            )


def find_own_files(output_dir: Path) -> dict[str, str | None]:
    """Names of the files of an export, with their checksums where its provenance has them."""
    try:
        content = read_json_object(output_dir / PROVENANCE_NAME)
    except UnreadableError:
        return {}
    tool, files = content.get("tool"), content.get(FILES)
    if not isinstance(tool, dict) or tool.get("name") != PRODUCER:
        return {}
    if isinstance(files, dict):
        return {**files, PROVENANCE_NAME: None}
    # Earlier versions listed no files.
    names = (CONFIG_NAME, CARD_NAME, PROVENANCE_NAME, INDEX_NAME, WEIGHTS_NAME)
    try:
        weight_map = read_json_object(output_dir / INDEX_NAME).get("weight_map")
    except UnreadableError:
        weight_map = None
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    return dict.fromkeys([*names, *map(str, shards)])


def check_can_run(source: TrainedDraft, served: DraftConfig, target: Target) -> None:
    """Refuse a draft that the target's engine cannot run, or whose weights are not finite.

    Raises:
        ExportError: The draft is refused, or its algorithm has no format for the target.
    """
    obstacles = target.find_obstacles(served)
    if obstacles:
        formats = source.algorithm.export_formats
        others = [x for name, x in TARGETS.items() if name in formats and x is not target]
        able = next((x for x in others if not x.find_obstacles(served)), None)
        raise ExportError(
            "\n".join(
                [f"{target.engine} cannot run `{source.name}`", *(f"  {x}" for x in obstacles)]
            ),
            hint=f"Export it for {able.engine} with `--target {able.name}`" if able else None,
        )
    broken = find_broken_values(source)
    if broken:
        raise ExportError(
            f"`{source.name}` has values that are not finite in `{broken[0]}`",
            hint="Export an earlier checkpoint of the run",
        )


def check_verifier(settings: ExportSettings, source: TrainedDraft, progress: Progress) -> bool:
    """Check sizes, layers and vocabulary against the verifier, where it can be read.

    Raises:
        SettingsError: Its folder is there, and its config.json cannot be read: no engine could.
        ExportError: The verifier does not fit, or its embedding differs from the one left out.
    """
    config, name = source.config, source.config.verifier_name_or_path
    leaves_out = not settings.export.embeddings and source.embedding is not None
    embedding = None
    if Path(name).is_dir():
        VerifierFiles(name).read_json(CONFIG_NAME)
    try:
        files = VerifierFiles(name)
        verifier = read_verifier_shape(files, trust_remote_code=settings.source.trust_remote_code)
        # From the hub, this would download gigabytes for one number.
        if files.is_local or leaves_out:
            embedding = load_embedding(files)
    except SpeculatorsError as error:
        progress.warn(
            f"Verifier `{name}` could not be read, so the draft was not checked against it: "
            f"{error.message}",
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
                hint="Pass the draft's own verifier with `--verifier-name-or-path`",
            )
    check_layers(source, verifier)
    if leaves_out and embedding is not None and not is_same_embedding(source.embedding, embedding):
        raise ExportError(
            f"The embedding of `{source.name}` is not that of verifier `{name}`",
            hint="Remove `--without-embeddings`",
        )
    return True


def check_layers(source: TrainedDraft, verifier: VerifierShape) -> None:
    """Refuse layer ids beyond the verifier's layers."""
    if source.config.target_layer_ids[-1] > verifier.num_layers:
        raise ExportError(
            f"`{source.name}` reads verifier layer {source.config.target_layer_ids[-1]}, "
            f"`{verifier.name_or_path}` has {verifier.num_layers}",
            hint="Pass the draft's own verifier with `--verifier-name-or-path`",
        )


def is_same_embedding(one: Tensor | None, other: Tensor) -> bool:
    """Whether two embeddings are equal in the less precise of their dtypes."""
    if one is None or one.shape != other.shape:
        return False
    dtype = min(one.dtype, other.dtype, key=lambda x: x.itemsize)
    return torch.equal(one.to(dtype), other.to(dtype))

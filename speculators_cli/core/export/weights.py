"""The weights of an export: cast, renamed for the target and sharded."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from speculators_cli.core.algorithms.export_format import ExportFormat
from speculators_cli.core.drafts.trained_draft import EMBEDDING, TrainedDraft
from speculators_cli.core.errors import ExportError
from speculators_cli.core.files import check_free_space, write_json
from speculators_cli.core.models.repo_files import INDEX_NAME


def cast_tensors(
    source: TrainedDraft, dtype: torch.dtype, *, with_embedding: bool
) -> dict[str, Tensor]:
    """Cast all tensors of the export, under the names of a checkpoint.

    Raises:
        ExportError: A value overflows the dtype, or the embedding is required.
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
            f"`{source.name}` has another hidden size than its verifier, and cannot share its "
            "embedding",
            hint="Remove `--without-embeddings`",
        )
    if not source.vocab_map.is_full:
        cast |= {"d2t": source.vocab_map.d2t, "t2d": source.vocab_map.t2d}
    return cast


def write_weights(
    tensors: Mapping[str, Tensor], config_file: Path, form: ExportFormat, max_shard_size: str
) -> int:
    """Write the weights next to config.json, sharded if large; return their size in bytes."""
    folder = config_file.parent
    renamed = {form.rename(name): x.contiguous() for name, x in tensors.items()}
    needed = sum(x.nbytes for x in renamed.values())
    check_free_space(
        folder.parent,
        needed,
        what="the export",
        hint="Free disk space, or pass another `--output-dir`",
    )
    shards = split_torch_state_dict_into_shards(renamed, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: renamed[name] for name in names}, folder / file, {"format": "pt"})
        shutil.copymode(config_file, folder / file)  # safetensors creates private files
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(index, folder / INDEX_NAME)
    return needed

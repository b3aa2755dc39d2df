"""read_draft(): a trained draft from a folder or the hub, whoever trained it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.checkpoint import (
    BEST_LINK,
    TRAINER_DIR,
    Checkpoint,
    find_checkpoints,
    is_ours,
    read_checkpoint,
)
from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.draft_config import Given, read_draft_config
from speculators_cli.core.models.repo_files import CONFIG_NAME, RepoFiles

EMBEDDING = "embed_tokens.weight"
# Parts of the verifier, and tables, that some trainers save beside the draft.
NOT_OF_THE_DRAFT = ("verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class DraftSource:
    """A trained draft as it lies on disk."""

    name: str  # the folder or hub id it was read from
    kind: str  # `checkpoint` of this package, `speculators` or `eagle3`
    config: Eagle3Config
    weights: Mapping[str, Tensor]  # those of `config.tensor_shapes()`, in the dtype of the file
    embedding: Tensor | None  # [vocab, hidden]; None: the verifier's
    vocab_map: VocabMap
    checkpoint: Checkpoint | None  # what `speculators train` saved with it


def read_draft(name_or_path: str, given: Given, *, flag: str) -> DraftSource:
    """Read a trained draft and check that it is whole.

    Args:
        name_or_path: A checkpoint, the save path of a run (its best, else latest checkpoint), any
            folder or hub id with an EAGLE-3 draft.
        given: What the user said of it.
        flag: Names the argument in messages.

    Raises:
        SettingsError: The folder does not exist.
        CheckpointError: It is no EAGLE-3 draft, or not a whole one.
        MachineError: The hub cannot be reached.
    """
    chosen = choose_checkpoint(Path(name_or_path))
    name = name_or_path if chosen == Path(name_or_path) else str(chosen)
    files = RepoFiles(name, flag=flag, error=CheckpointError)
    checkpoint = _read_own(files.folder) if files.is_local else None
    content = files.read_json(CONFIG_NAME)
    config = read_draft_config(content, given, name=name)
    tensors = _renamed(files.read_tensors(), name)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    embedding = tensors.pop(EMBEDDING, None)
    if t2d is not None:
        config = replace(config, vocab_size=len(t2d))
    elif embedding is not None:
        config = replace(config, vocab_size=len(embedding))
    is_plain = content.get("speculators_model_type") is None
    kind = "checkpoint" if checkpoint else "eagle3" if is_plain else "speculators"
    return DraftSource(
        name=name,
        kind=kind,
        config=config,
        weights=_check_tensors(tensors, embedding, config, name),
        embedding=embedding,
        vocab_map=_vocab_map(d2t, t2d, config, name),
        checkpoint=checkpoint,
    )


def choose_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant: the best or latest of a save path, else `path` itself.

    Raises:
        CheckpointError: The folder holds neither a checkpoint nor a config.json.
    """
    if not path.is_dir() or (path / CONFIG_NAME).exists():
        return path
    best = path / BEST_LINK
    if best.is_symlink() and read_checkpoint(best) is not None:
        return path / best.readlink()
    found = find_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"`{path}` holds neither a whole checkpoint nor a config.json",
            hint="Name a checkpoint or the `--save-path` of a run that saved one",
        )
    return found[-1].folder


def _read_own(folder: Path) -> Checkpoint | None:
    """The checkpoint of this package in a folder, every byte compared; None: another's."""
    if not (is_ours(folder) and (folder / TRAINER_DIR).is_dir()):
        return None
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(
            f"`{folder}` is not a whole checkpoint", hint="Name another checkpoint of the run"
        )
    checkpoint.verify()
    return checkpoint


def _renamed(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Tensors under the names that a checkpoint of this package gives them."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        own = key.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
        if own in renamed:
            raise CheckpointError(
                f"`{name}` holds `{own}` twice, once as `{key}`", hint="Download it again"
            )
        renamed[own] = tensor
    return renamed


def _check_tensors(
    tensors: Mapping[str, Tensor], embedding: Tensor | None, config: Eagle3Config, name: str
) -> dict[str, Tensor]:
    """The draft's own tensors, all there, of the right shapes, and no others."""
    found = {key: x for key, x in tensors.items() if not key.endswith(NOT_OF_THE_DRAFT)}
    # Upstream's first versions kept a norm gain per layer that only the first one reads.
    unread = {f"layers.{i}.hidden_norm.weight" for i in range(1, config.num_layers)}
    found = {key: x for key, x in found.items() if key not in unread}
    shapes = config.tensor_shapes()
    problems = [f"lacks `{key}`" for key in sorted(shapes.keys() - found.keys())]
    problems += [f"has an unknown tensor `{key}`" for key in sorted(found.keys() - shapes.keys())]
    expected = shapes | {EMBEDDING: (config.vocab_size, config.hidden_size)}
    given = dict(found) | ({} if embedding is None else {EMBEDDING: embedding})
    for key in sorted(given.keys() & expected.keys()):
        if tuple(given[key].shape) != expected[key]:
            problems.append(f"has `{key}` {tuple(given[key].shape)}, expected {expected[key]}")
        elif not given[key].is_floating_point() or given[key].element_size() < 2:
            problems.append(f"has `{key}` in {given[key].dtype}, expected a plain float")
    if problems:
        raise CheckpointError(
            "\n".join(
                [
                    f"`{name}` is not the draft its config.json describes",
                    *(f"  it {problem}" for problem in problems[:10]),
                ]
            ),
            hint="Download it again, or name another checkpoint",
        )
    return found


def _vocab_map(d2t: Tensor | None, t2d: Tensor | None, config: Eagle3Config, name: str) -> VocabMap:
    if d2t is None:
        if config.draft_vocab_size != config.vocab_size:
            raise CheckpointError(
                f"`{name}` lacks `d2t`, with {config.draft_vocab_size:,} draft tokens for "
                f"{config.vocab_size:,} of the verifier",
                hint="Download it again",
            )
        return VocabMap.full(config.vocab_size)
    kept = d2t.long() + torch.arange(len(d2t))
    is_map = (
        bool((kept.diff() > 0).all()) and 0 <= int(kept[0]) <= int(kept[-1]) < config.vocab_size
    )
    kept_mask = torch.zeros(config.vocab_size, dtype=torch.bool)
    if is_map:
        kept_mask[kept] = True
    agrees = t2d is None or torch.equal(t2d.bool(), kept_mask)
    if not is_map or not agrees or len(d2t) != config.draft_vocab_size:
        raise CheckpointError(
            f"The draft vocabulary of `{name}` is broken: `d2t` ({len(d2t):,} offsets, expected "
            f"{config.draft_vocab_size:,}) does not give ascending ids that `t2d` keeps",
            hint="Download it again, or name another checkpoint",
        )
    return VocabMap(d2t.long(), kept_mask)

"""read_draft(): read a trained draft of any tool from a folder or the hub."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import DraftConfig, is_speculators
from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.algorithms.overrides import NO_OVERRIDES, Overrides
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.drafts.checkpoint_reader import (
    BEST_LINK,
    TRAINER_DIR,
    Checkpoint,
    Damaged,
    inspect_checkpoint,
    list_checkpoints,
)
from speculators_cli.core.errors import CheckpointError, SettingsError
from speculators_cli.core.models.config_values import Values
from speculators_cli.core.models.repo_files import CONFIG_NAME, RepoFiles

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
ASSUMED_HINT = "Add them to its config.json if it was trained with other values"
MAX_VOCAB = 2**24  # the largest in use have a few hundred thousand
_LAYER = re.compile(r"^layers\.(\d{1,9})\.")
# Parts of the verifier and buffers that some tools save with the draft.
NOT_OF_THE_DRAFT = ("verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class TrainedDraft:
    """A trained draft, as it is on disk."""

    name: str  # the folder or hub id it was read from
    kind: str  # `checkpoint` of this package, `speculators`, or the algorithm in its own format
    config: DraftConfig
    weights: Mapping[str, Tensor]  # those of `config.tensor_shapes()`, in the dtype of the file
    embedding: Tensor | None  # [vocab, hidden]; None: the verifier's
    vocab_map: VocabMap
    checkpoint: Checkpoint | None  # what `speculators train` saved with it
    assumed: Mapping[str, Any]  # values that its config.json lacks and no tensor determines
    recorded_verifier: str | None = None  # the verifier in its config.json, whatever was passed

    @property
    def assumption(self) -> str | None:
        """A sentence about assumed values; None if there are none."""
        if not self.assumed:
            return None
        listed = ", ".join(f"`{key}` {value:g}" for key, value in self.assumed.items())
        return (
            f"The config.json of `{self.name}` does not set all values: assumed {listed}, the "
            "defaults of engines for these layers"
        )

    @property
    def algorithm(self) -> Algorithm[Any, Any]:
        """The algorithm of the draft."""
        return ALGORITHMS[self.config.algorithm]

    def build_drafter(
        self, embedding: Tensor, *, num_draft_tokens: int, head: Tensor | None = None
    ) -> Drafter:
        """A drafter on the device of an embedding: the verifier's, or the draft's own.

        Args:
            embedding: [vocab, hidden]
            num_draft_tokens: Draft tokens per verifier forward pass.
            head: [vocab, hidden]: the verifier's LM head; needed unless `config.owns_head`.
        """
        return self.algorithm.build_drafter(
            self.config,
            self.weights,
            embedding,
            self.vocab_map.kept_ids,
            num_draft_tokens=num_draft_tokens,
            head=head,
        )

    def compute_probe_logits(self, embedding: Tensor) -> Tensor:
        """Logits over fixed random inputs; [rows, draft_vocab], float32."""
        return self.algorithm.compute_probe_logits(self.config, self.weights, embedding)


def read_draft(
    name_or_path: str, overrides: Overrides = NO_OVERRIDES, *, flag: str = "name_or_path"
) -> TrainedDraft:
    """Read a trained draft and check that it is complete.

    Args:
        name_or_path: A checkpoint, the save path of a run (its best, else latest checkpoint), any
            folder or hub id with a draft.
        overrides: Values of the user that replace those of its config.json.
        flag: The argument, for messages.

    Raises:
        SettingsError: The folder does not exist.
        CheckpointError: It is not a complete draft of a known algorithm.
        MachineError: The hub cannot be reached.
    """
    chosen = choose_checkpoint(Path(name_or_path))
    name = name_or_path if chosen == Path(name_or_path) else str(chosen)
    files = RepoFiles(name, flag=flag, error=CheckpointError)
    checkpoint = _read_own(files.folder) if files.is_local else None
    content = files.read_json(CONFIG_NAME)
    algorithm = find_algorithm(content, name)
    config: DraftConfig = algorithm.read_config(content, overrides, name=name)
    tensors = _renamed(files.read_tensors(), algorithm, name)
    config = algorithm.fit_config(_fit_config(config, tensors, name), content, tensors)
    _check_num_layer_ids(config, overrides, algorithm.count_aux_layers(config, tensors), name)
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    embedding = tensors.pop(EMBEDDING, None)
    if algorithm.ties_head(content, name=name):
        tensors = _untie(tensors, embedding, config, name)
    weights = _check_tensors(tensors, embedding, config, algorithm.find_unread(config), name)
    vocab_map, order = _read_vocab_map(d2t, t2d, config, name)
    if order is not None:
        weights[HEAD] = weights[HEAD][order]
    kind = "speculators" if is_speculators(content) else algorithm.name
    return TrainedDraft(
        name=name,
        kind="checkpoint" if checkpoint else kind,
        config=config,
        weights=weights,
        embedding=embedding,
        vocab_map=vocab_map,
        checkpoint=checkpoint,
        assumed=algorithm.find_assumed(content, config),
        recorded_verifier=_find_verifier(content, name),
    )


def find_algorithm(content: Mapping[str, Any], name: str) -> Algorithm[Any, Any]:
    """The algorithm of a draft, from the content of its config.json.

    Raises:
        CheckpointError: It is of no known algorithm.
    """
    for algorithm in ALGORITHMS.values():
        if algorithm.recognises(content):
            return algorithm
    kind = content.get("speculators_model_type")
    architecture = next(iter(Values(content, name).texts("architectures")), None)
    known = ", ".join(f"`{name}`" for name in ALGORITHMS)
    raise CheckpointError(
        f"`{name}` is a draft of algorithm `{kind}`, expected {known}"
        if kind is not None
        else f"`{name}` is no draft: its config.json has neither `speculators_model_type` nor "
        f"`draft_vocab_size`, but architecture `{architecture}`",
        hint="Pass a checkpoint of `speculators train`, or a draft of one of these algorithms: "
        f"{known}",
    )


def choose_checkpoint(path: Path) -> Path:
    """Choose the best or latest checkpoint of a save path, else `path` itself.

    Raises:
        CheckpointError: The folder holds neither a checkpoint nor a config.json.
    """
    if not path.is_dir() or (path / CONFIG_NAME).exists():
        return path
    best = path / BEST_LINK
    if best.is_symlink() and best.exists():
        chosen = inspect_checkpoint(path / best.readlink())
        if isinstance(chosen, Damaged):
            raise chosen.to_error()
        if chosen is not None:
            return chosen.folder
    found, damaged = list_checkpoints(path)
    if not found and damaged:
        raise damaged[-1].to_error()
    if not found:
        raise CheckpointError(
            f"`{path}` holds neither a whole checkpoint nor a config.json",
            hint="Pass a checkpoint or the `--save-path` of a run that saved one",
        )
    return found[-1].folder


def _find_verifier(content: Mapping[str, Any], name: str) -> str | None:
    values = Values(content, name)
    if not is_speculators(content) or not values.has("speculators_config"):
        return None
    return values.part("speculators_config").part("verifier").text("name_or_path")


def _read_own(folder: Path) -> Checkpoint | None:
    """Read and verify a checkpoint of this package; None for a draft of another tool."""
    if not (folder / TRAINER_DIR).is_dir():
        return None
    checkpoint = inspect_checkpoint(folder)
    if isinstance(checkpoint, Damaged):
        raise checkpoint.to_error()
    if checkpoint is not None:
        checkpoint.verify()
    return checkpoint


def _renamed(
    tensors: Mapping[str, Tensor], algorithm: Algorithm[Any, Any], name: str
) -> dict[str, Tensor]:
    """Tensors under the names and in the shapes of this package's checkpoints."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        own = algorithm.checkpoint_name(key)
        if own in renamed:
            raise CheckpointError(
                f"`{name}` holds `{own}` twice, once as `{key}`", hint="Download it again"
            )
        renamed[own] = algorithm.checkpoint_tensor(own, tensor)
    return renamed


def _fit_config(config: DraftConfig, tensors: Mapping[str, Tensor], name: str) -> DraftConfig:
    """The config with sizes taken from the tensors; refused before use if it contradicts them."""
    found = {int(number) for key in tensors for number in _LAYER.findall(key)}
    if config.num_layers != len(found):
        raise CheckpointError(
            f"`{name}` is not the draft its config.json describes: `num_hidden_layers` is "
            f"{config.num_layers:,}, and the weights have {len(found):,} layers",
            hint="Download it again, or pass another checkpoint",
        )
    rows = tensors.get("t2d", tensors.get(EMBEDDING))
    if rows is not None and rows.dim() > 0:
        config = replace(config, vocab_size=len(rows))
    if max(config.vocab_size, config.draft_vocab_size) > MAX_VOCAB:
        raise CheckpointError(
            f"`{name}` has a vocabulary of {max(config.vocab_size, config.draft_vocab_size):,} "
            f"tokens in its config.json, expected at most {MAX_VOCAB:,}",
            hint="Download it again, or pass another checkpoint",
        )
    return config


def _check_num_layer_ids(
    config: DraftConfig, overrides: Overrides, num_layers: int | None, name: str
) -> None:
    """Refuse layer ids whose number is not that of the layers that the weights read.

    Raises:
        SettingsError: They were passed by flag.
        CheckpointError: They are from config.json, or assumed.
    """
    if num_layers is None or num_layers == config.num_aux_layers:
        return
    ids = ",".join(map(str, config.target_layer_ids))
    weights = f"the weights of `{name}` read {num_layers} verifier layers"
    if overrides.target_layer_ids is not None:
        raise SettingsError(
            f"`--target-layer-ids` is `{ids}`, and {weights}",
            hint=f"Pass the ids of the {num_layers} layers that it was trained on, or leave it out",
        )
    where = "assumed" if config.are_layer_ids_assumed else "in its config.json"
    raise CheckpointError(
        f"The layer ids `{ids}` {where} are not those of the draft: {weights}",
        hint=f"Pass the {num_layers} layers that it was trained on with `--target-layer-ids`",
    )


def _untie(
    tensors: dict[str, Tensor], embedding: Tensor | None, config: DraftConfig, name: str
) -> dict[str, Tensor]:
    """The tensors with a separate LM head, for configs that tie it to the embedding."""
    head = tensors.get(HEAD)
    if embedding is None or config.draft_vocab_size != config.vocab_size:
        return tensors  # Nothing to tie to: engines load the LM head.
    if head is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"`{name}` has `tie_word_embeddings` on, and an `{HEAD}` that is not its embedding",
            hint="Correct `tie_word_embeddings` in its config.json: engines read one or the other",
        )
    return tensors | {HEAD: embedding}


def _check_tensors(
    tensors: Mapping[str, Tensor],
    embedding: Tensor | None,
    config: DraftConfig,
    unread: Set[str],
    name: str,
) -> dict[str, Tensor]:
    """The tensors of the draft, complete and with the expected shapes; refuses others."""
    found = {key: x for key, x in tensors.items() if not key.endswith(NOT_OF_THE_DRAFT)}
    found = {key: x for key, x in found.items() if key not in unread}
    shapes = config.tensor_shapes()
    problems = [f"lacks `{key}`" for key in sorted(shapes.keys() - found.keys())]
    problems += [_describe_unknown(key) for key in sorted(found.keys() - shapes.keys())]
    expected = shapes | {EMBEDDING: (config.vocab_size, config.hidden_size)}
    given = dict(found) | ({} if embedding is None else {EMBEDDING: embedding})
    for key in sorted(given.keys() & expected.keys()):
        if tuple(given[key].shape) != expected[key]:
            problems.append(f"has `{key}` {tuple(given[key].shape)}, expected {expected[key]}")
        elif not given[key].is_floating_point() or given[key].element_size() < 2:
            dtype = str(given[key].dtype).removeprefix("torch.")
            problems.append(f"has `{key}` quantised to {dtype}, expected a plain float")
    if problems:
        raise CheckpointError(
            "\n".join(
                [
                    f"`{name}` is not the draft its config.json describes",
                    *(f"  it {problem}" for problem in problems[:10]),
                ]
            ),
            hint="Download it again, or pass another checkpoint",
        )
    return found


def _describe_unknown(key: str) -> str:
    if key.endswith(".bias"):
        return f"has a bias `{key}`, which this package does not support"
    if key.endswith((".qkv_proj.weight", ".gate_up_proj.weight")):
        return f"has `{key}`, fused projections, expected separate tensors"
    if key.endswith(("_scale", "_scale_inv", "_zero_point", ".qweight", ".scales", "_packed")):
        return f"is quantised: it has `{key}`"
    return f"has an unknown tensor `{key}`"


def _read_vocab_map(
    d2t: Tensor | None, t2d: Tensor | None, config: DraftConfig, name: str
) -> tuple[VocabMap, Tensor | None]:
    """The draft vocabulary in ascending order, and the order of the LM head's rows for it.

    Some tools order tokens by frequency. Engines support any order, so rows and offsets are sorted
    together. None as order: they are sorted already.
    """
    if d2t is None:
        if config.draft_vocab_size != config.vocab_size:
            raise CheckpointError(
                f"`{name}` lacks `d2t`, with {config.draft_vocab_size:,} draft tokens for "
                f"{config.vocab_size:,} of the verifier",
                hint="Download it again",
            )
        return VocabMap.full(config.vocab_size), None
    problem = _find_map_problem(d2t, t2d, config)
    if problem is None:
        kept = d2t.long() + torch.arange(len(d2t))
        order = kept.argsort()
        ascending = kept[order]
        is_sorted = torch.equal(ascending, kept)
        # Unsorted ids could be mistaken for offsets.
        if not is_sorted and t2d is None and int(d2t.min()) >= 0:
            problem = "contains ids, expected offsets"
    if problem is None:
        kept_mask = torch.zeros(config.vocab_size, dtype=torch.bool)
        kept_mask[kept] = True
        if t2d is None or torch.equal(t2d.bool(), kept_mask):
            vocab_map = VocabMap(ascending - torch.arange(len(kept)), kept_mask)
            return vocab_map, None if is_sorted else order
        problem = "contains other tokens than `t2d`"
    raise CheckpointError(
        f"The draft vocabulary of `{name}` is broken: `d2t` {problem}",
        hint="Download it again, or pass another checkpoint",
    )


def _find_map_problem(d2t: Tensor, t2d: Tensor | None, config: DraftConfig) -> str | None:
    """Why the maps do not assign one verifier token to each row, as the end of a sentence."""
    for tensor, expected in ((d2t, config.draft_vocab_size), (t2d, config.vocab_size)):
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.shape != (expected,):
            word = "" if tensor is d2t else "comes with a `t2d` that "
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"{word}is {tuple(tensor.shape)} of {dtype}, expected ({expected:,},) of int64"
    kept = d2t.long() + torch.arange(len(d2t))
    if int(kept.min()) < 0 or int(kept.max()) >= config.vocab_size:
        return (
            f"maps to ids from {int(kept.min()):,} to {int(kept.max()):,}, expected 0 to "
            f"{config.vocab_size - 1:,}"
        )
    num_twice = len(kept) - len(kept.unique())
    return f"maps to {num_twice:,} ids twice" if num_twice else None

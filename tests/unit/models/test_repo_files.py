"""Files of a model that are missing, damaged, stale or of somebody else."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_cli.core.errors import CheckpointError, MachineError, SettingsError
from speculators_cli.core.models import repo_files
from speculators_cli.core.models.repo_files import RepoFiles
from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from tests.tiny_run import write_verifier

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"


def load(folder: Path) -> torch.Tensor:
    """The head of a verifier, read with everything that training reads."""
    files = VerifierFiles(str(folder))
    config = read_verifier_config(files, trust_remote_code=False)
    return load_frozen_verifier(files, config).head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A verifier in one weights file."""
    write_verifier(tmp_path / "verifier")
    return tmp_path / "verifier"


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in two shards, the head in the second."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {HEAD: tensors.pop(HEAD)}}
    shards["a.safetensors"] = tensors
    for name, held in shards.items():
        save_file(held, folder / name)
    write_index(folder, {key: name for name, held in shards.items() for key in held})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty (0 bytes)"),
        ('{"metadata": {"total_si', "is truncated"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("<html>", "is a web page"),
        ("[]", "holds a list, expected an object"),
        ("{}", "has no `weight_map` that lists tensors"),
        ('{"weight_map": {}}', "has no `weight_map` that lists tensors"),
        ('{"weight_map": ["a"]}', "has no `weight_map` that lists tensors"),
        ('{"weight_map": {"a": 1}}', "lists `a` in `1`, which is outside of its folder"),
    ],
)
@pytest.mark.parametrize("error", [SettingsError, CheckpointError])
def test_an_index_that_cannot_be_used_is_named(
    content: str, reason: str, error: type[SettingsError], sharded: Path
) -> None:
    (sharded / INDEX).write_text(content)
    files = RepoFiles(str(sharded), flag="--flag", error=error)

    with pytest.raises(error) as caught:
        files.read_tensors()

    assert caught.value.message.startswith(f"`--flag`: `{sharded / INDEX}` {reason}")
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "", ".", "a\0b", "..\\a.safetensors"]
)
def test_an_index_opens_no_file_outside_its_folder(name: str, sharded: Path) -> None:
    write_index(sharded, read_index(sharded) | {HEAD: name})

    with pytest.raises(SettingsError, match="which is outside of its folder"):
        load(sharded)


def test_a_shard_below_its_folder_is_read(sharded: Path) -> None:
    (sharded / "below").mkdir()
    (sharded / "b.safetensors").rename(sharded / "below" / "b.safetensors")
    expected = load_file(sharded / "below" / "b.safetensors")[HEAD]
    write_index(sharded, read_index(sharded) | {HEAD: "below/b.safetensors"})

    assert torch.equal(load(sharded), expected)


Damage = Callable[[Path], object]
STALE: dict[str, tuple[Damage, str, str]] = {
    "lists a tensor that its file lacks": (
        lambda f: write_index(f, read_index(f) | {HEAD: "a.safetensors"}),
        "lists `lm_head.weight` in `a.safetensors`, which lacks it",
        "Download `a.safetensors` and the index again",
    ),
    "lists a file that is missing": (
        lambda f: (f / "b.safetensors").unlink(),
        "lists `lm_head.weight` in `b.safetensors`, which is missing",
        "Download `b.safetensors` and the index again",
    ),
    "does not list a tensor": (
        lambda f: write_index(f, {k: x for k, x in read_index(f).items() if k != HEAD}),
        "does not list `lm_head.weight` of `b.safetensors`",
        "Download `b.safetensors` and the index again",
    ),
}


@pytest.mark.parametrize("name", STALE)
def test_an_index_of_other_weights_is_named(name: str, sharded: Path) -> None:
    damage, reason, hint = STALE[name]
    damage(sharded)

    with pytest.raises(SettingsError) as caught:
        load(sharded)

    assert f"`{sharded / INDEX}` {reason}" in caught.value.message
    assert caught.value.hint == hint


def test_an_old_index_beside_a_whole_file_can_be_removed(folder: Path) -> None:
    write_index(
        folder, dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00002.safetensors")
    )

    with pytest.raises(SettingsError) as caught:
        load(folder)

    assert caught.value.hint == (
        f"Remove the index if `{WEIGHTS}` has all weights, or download both again"
    )


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    head = load_file(sharded / "b.safetensors")
    first = load_file(sharded / "a.safetensors")
    save_file(first | {HEAD: head[HEAD] + 1}, sharded / "a.safetensors")

    with pytest.raises(CheckpointError, match=r"holds `lm_head.weight`, as `a.safetensors` does"):
        RepoFiles(str(sharded), flag="--flag", error=CheckpointError).read_tensors()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "is truncated or damaged"),
        (lambda f: f.write_bytes((2**60).to_bytes(8, "little")), "is not a safetensors file"),
        (lambda f: (f.unlink(), f.symlink_to("gone")), "is a link to `gone`, which does not exist"),
    ],
)
def test_damaged_weights_are_named(damage: Damage, reason: str, folder: Path) -> None:
    damage(folder / WEIGHTS)

    with pytest.raises(SettingsError) as caught:
        load(folder)

    assert f"`{folder / WEIGHTS}` {reason}" in caught.value.message


def test_a_verifier_in_a_pickled_state_dict_is_read_as_data(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()

    assert torch.equal(load(folder), tensors[HEAD])


def test_a_pickled_verifier_in_shards_is_read_as_data(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    assert torch.equal(load(folder), tensors[HEAD])


def test_weights_of_another_kind_are_named(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")

    with pytest.raises(SettingsError, match=r"found `consolidated.safetensors`") as caught:
        load(folder)

    assert caught.value.hint is not None


def test_a_file_in_the_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        VerifierFiles(str(folder / "config.json"))

    assert caught.value.message.endswith("config.json` is not a folder")
    assert caught.value.hint == f"Pass the model's folder `{folder}`"


@pytest.mark.parametrize("name", ["", "a" * 5000, "two\0words"])
def test_a_name_that_can_be_no_folder_is_neither_one_nor_a_hub_id(name: str) -> None:
    with pytest.raises(SettingsError, match="neither a folder nor a hub id"):
        load(Path(name)) if name else VerifierFiles(name).file("config.json")


def test_a_cache_that_cannot_be_written_is_told_from_a_hub_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(repo_files, "hf_hub_download", refuse)

    with pytest.raises(MachineError, match=r"cannot be stored in .*: Permission denied") as caught:
        VerifierFiles("example/verifier").find("config.json")

    assert caught.value.hint == (
        "Set `HF_HOME` to a folder that you may write to, or pass a local folder"
    )


def test_the_offline_switch_is_named_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(MachineError, match="`HF_HUB_OFFLINE` is set") as caught:
        VerifierFiles("example/verifier").find("config.json")

    assert caught.value.hint == "Unset `HF_HUB_OFFLINE`, or pass a local folder"

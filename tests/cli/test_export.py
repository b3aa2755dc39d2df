"""`speculators export` as the user types it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from speculators_cli.cli.app import run
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.weights import cast_tensors
from tests.cli.killed_export import STAGES
from tests.fork_server import ForkServer
from tests.tiny_drafts import read_folder, write_folder
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]
CAST = "speculators_cli.core.export.export.cast_tensors"  # where the command looks it up


def export(*flags: object) -> int:
    return run(["export", *map(str, flags)])


@pytest.fixture(scope="module")
def trained(
    shared_inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The save path of a short run, made once for each set of flags."""
    made: dict[tuple[str, ...], Path] = {}

    def train(*flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("run") / "checkpoints"
            own = shared_inputs.flags(save_path=made[flags], epochs=1)
            assert run(["train", *own, *flags]) == 0
        return made[flags]

    return train


@pytest.fixture
def checkpoints(trained: Callable[..., Path]) -> Path:
    return trained()


@pytest.fixture
def served(checkpoints: Path, tmp_path: Path) -> Path:
    """An export in float32."""
    assert export(checkpoints, "--output-dir", tmp_path / "served", "--dtype", "float32") == 0
    return tmp_path / "served"


VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "full-vocabulary": ["--full-vocab"],
    "two-layers": ["--num-layers", "2"],
    "qwen3": ["--draft-arch", "qwen3"],
    "fc-norm": ["--fc-norm"],
    "norm-before-fc": ["--norm-before-fc"],
    "norm-output": ["--norm-output"],
    "residual-before-norm": ["--no-norm-before-residual"],
    "window": ["--sliding-window", "6", "--num-layers", "2", "--draft-arch", "qwen3"],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_the_checkpoint_in_another_type(
    trained: Callable[..., Path], tmp_path: Path, capsys: Capture, variant: str, dtype: str
) -> None:
    save_path = trained(*VARIANTS[variant])
    capsys.readouterr()

    code = export(save_path, "--output-dir", tmp_path / "served", "--dtype", dtype, "--json")

    report = json.loads(capsys.readouterr().out)
    content, tensors = read_folder(tmp_path / "served")
    _, source = read_folder(Path(report["source"]))
    assert code == 0
    assert (report["is_verified"], report["is_verifier_checked"]) == (True, True)
    assert tensors.keys() == source.keys()
    for name, tensor in source.items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert torch.equal(tensors[name], expected), name
    assert ("d2t" in tensors) == (variant != "full-vocabulary")
    assert content["eagle_aux_hidden_state_layer_ids"] == [3, 5, 7]
    layers = content["transformer_layer_config"]
    kinds, window = layers.get("layer_types"), layers.get("sliding_window")
    is_windowed = variant == "window"
    assert (kinds, window) == ((["sliding_attention"] * 2, 6) if is_windowed else (None, None))
    card = (tmp_path / "served/README.md").read_text()
    assert ("sliding window of 6 tokens" in card) == is_windowed
    assert report["logit_error"] == 0 if dtype == "float32" else 0 < report["logit_error"] < 0.03


def test_the_best_checkpoint_of_a_run_is_taken(checkpoints: Path, tmp_path: Path) -> None:
    best = (checkpoints / "checkpoint_best").readlink()

    codes = [
        export(source, "--output-dir", tmp_path / str(index))
        for index, source in enumerate(
            (checkpoints, checkpoints / "checkpoint_best", checkpoints / best)
        )
    ]

    files = [(tmp_path / str(index) / "model.safetensors").read_bytes() for index in range(3)]
    assert codes == [0, 0, 0]
    assert files[0] == files[1] == files[2]


def test_an_export_can_be_exported_again(served: Path, tmp_path: Path) -> None:
    assert export(served, "--output-dir", tmp_path / "again", "--dtype", "float32") == 0

    assert read_folder(tmp_path / "again")[0] == read_folder(served)[0]
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        served / "model.safetensors"
    ).read_bytes()


def test_the_card_and_the_provenance_say_where_it_comes_from(
    checkpoints: Path, tmp_path: Path
) -> None:
    flags = ("--license", "mit", "--verifier-name-or-path", "example/verifier")
    export(checkpoints, "--output-dir", tmp_path / "served", *flags)

    card = (tmp_path / "served/README.md").read_text()
    provenance = json.loads((tmp_path / "served/provenance.json").read_text())
    state = json.loads((checkpoints / "checkpoint_best/trainer/state.json").read_text())
    assert "license: mit" in card
    assert "base_model: example/verifier" in card
    assert f"vllm serve {tmp_path / 'served'}" in card
    assert f"{state['metrics']['acceptance_length']:.2f} tokens per verifier pass" in card
    assert provenance["training"]["data_hash"] == state["data_hash"]
    assert provenance["training"]["settings"]["optimizer"]["lr"] == 3e-3
    assert "save_path" not in json.dumps(provenance)


def test_a_card_shows_hostile_names_and_does_nothing_of_what_they_say(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    name = 'a: "b"\n---\n# c | ![x](https://e.example/p.png) <script>```\x1b[2J\udce9'
    licence = "mit\n---\nbase_model: \u202eother"

    code = export(
        trained("--no-norm-before-residual"),
        *("--output-dir", tmp_path / "served", "--license", licence, "--target", "eagle"),
        *("--verifier-name-or-path", name),
    )

    text = (tmp_path / "served/README.md").read_text("utf-8")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(front)
    before, block, after = body.split("````")
    shown = (
        r'a: "b"\\n---\\n\# c \| \!\[x\](https\://e.example/p.png) \<script\>\`\`\`'
        r"\\x1b\[2J\\xe9"
    )
    assert code == 0
    assert data["license"].startswith("mit")
    assert "base_model" not in data
    assert f"# EAGLE-3 draft for {shown}\n" in before
    assert f"| verifier | {shown} |\n" in after
    assert "vllm serve 'a: " in block
    assert not set(text) & {"\x1b", "\u202e", "\udce9"}


ADVICE = {
    (): ("0.22.0", "Tested with vLLM 0.22.0 to 0.32.0."),
    ("--norm-before-fc",): ("0.22.0", "Tested with vLLM 0.22.0 to 0.32.0."),
    ("--norm-output",): (
        "0.25.0",
        "Needs vLLM 0.25.0 or newer: older ones ignore its `norm_output` and silently accept "
        "fewer tokens.",
    ),
    ("--fc-norm",): (
        "0.25.0",
        "Needs vLLM 0.25.0 or newer: older ones do not load its `fc_norm`.",
    ),
    ("--sliding-window", "6"): ("0.22.0", "Tested with vLLM 0.22.0 to 0.32.0."),
    ("--sliding-window", "6", "--draft-arch", "qwen3"): (
        "0.26.0",
        "Needs vLLM 0.26.0 or newer: older ones ignore the sliding window of its qwen3 layers and "
        "silently accept fewer tokens; they do not load its qwen3 layers.",
    ),
    ("--draft-arch", "qwen3", "--norm-output"): (
        "0.25.0",
        "Needs vLLM 0.25.0 or newer: older ones ignore its `norm_output` and silently accept "
        "fewer tokens; they do not load its qwen3 layers.",
    ),
}


@pytest.mark.parametrize("flags", ADVICE)
def test_the_user_is_told_which_engine_the_draft_needs(
    trained: Callable[..., Path], tmp_path: Path, capsys: Capture, flags: tuple[str, ...]
) -> None:
    save_path = trained(*flags)
    capsys.readouterr()

    assert export(save_path, "--output-dir", tmp_path / "one") == 0
    out = capsys.readouterr().out
    assert export(save_path, "--output-dir", tmp_path / "two", "--json") == 0

    oldest, sentence = ADVICE[flags]
    assert sentence in out.splitlines()
    assert sentence in (tmp_path / "one/README.md").read_text().splitlines()
    assert json.loads(capsys.readouterr().out)["oldest_vllm"] == oldest


def test_an_export_for_another_engine_names_no_release_of_vllm(
    trained: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    save_path = trained("--no-norm-before-residual")
    capsys.readouterr()

    code = export(save_path, "--output-dir", tmp_path / "out", "--target", "sglang", "--json")

    assert code == 0
    assert json.loads(capsys.readouterr().out)["oldest_vllm"] is None
    assert "vLLM" not in (tmp_path / "out/README.md").read_text()


LICENCES = {
    "apache-2.0": ("license: apache-2.0", ["license: apache-2.0"], False),
    "own": (
        "license: other\nlicense_name: llama3.1\nlicense_link: https://example.com/l",
        ["license: other", "license_name: llama3.1", "license_link: https://example.com/l"],
        False,
    ),
    "file": ("license: other\nlicense_link: LICENSE", ["license: other"], False),
    "none": ("tags: [a]", ["license: unknown"], False),
    "two": ("license: [mit, gpl]", ["license: unknown"], False),
    "broken": (": : [", ["license: unknown"], True),
}


@pytest.mark.parametrize("name", LICENCES)
def test_the_card_proposes_the_licence_of_the_verifier(
    checkpoints: Path, shared_inputs: TinyInputs, tmp_path: Path, capsys: Capture, name: str
) -> None:
    front, expected, is_warned = LICENCES[name]
    verifier = shutil.copytree(shared_inputs.verifier_dir, tmp_path / "verifier")
    (verifier / "README.md").write_text(f"---\n{front}\n---\n# A verifier\n")
    flags = ("--verifier-name-or-path", verifier)

    assert export(checkpoints, "--output-dir", tmp_path / "its", *flags) == 0
    warned = capsys.readouterr().err
    assert export(checkpoints, "--output-dir", tmp_path / "own", *flags, "--license", "mit") == 0

    its, own = (
        [
            line
            for line in (tmp_path / x / "README.md").read_text().splitlines()
            if "license" in line
        ]
        for x in ("its", "own")
    )
    assert its == expected
    assert own == ["license: mit"]
    assert ("The licence of verifier" in warned) == is_warned


@pytest.mark.parametrize(
    ("verifier", "line"),
    [
        ("example/verifier", "vllm serve {served}\n"),
        (None, 'vllm serve {verifier} --speculative-config \'{{"method": "eagle3", "model": '),
    ],
)
def test_the_serve_line_suits_the_verifier(
    checkpoints: Path,
    shared_inputs: TinyInputs,
    tmp_path: Path,
    capsys: Capture,
    verifier: str | None,
    line: str,
) -> None:
    flags = [] if verifier is None else ["--verifier-name-or-path", verifier]

    export(checkpoints, "--output-dir", tmp_path / "served", *flags)

    err = capsys.readouterr().err
    expected = line.format(served=tmp_path / "served", verifier=shared_inputs.verifier_dir)
    assert f"hint: {expected}" in err


def test_large_weights_are_split_over_files(served: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--max-shard-size", "10KB")

    assert export(served, "--output-dir", tmp_path / "split", *flags) == 0

    shards = sorted((tmp_path / "split").glob("*.safetensors"))
    joined = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = read_folder(served)[1]
    assert len(shards) > 2
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_the_embedding_can_be_left_to_the_verifier(served: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"

    assert export(served, "--output-dir", out, "--without-embeddings") == 0

    assert "embed_tokens.weight" not in read_folder(out)[1]


def test_another_embedding_is_not_left_out(served: Path, tmp_path: Path, capsys: Capture) -> None:
    content, tensors = read_folder(served)
    tensors["embed_tokens.weight"][3, 4] += 1
    write_folder(tmp_path / "changed", content, tensors)

    code = export(tmp_path / "changed", "--output-dir", tmp_path / "small", "--without-embeddings")

    assert code == 4
    assert "is not that of verifier" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_wrong_export_is_not_kept(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def spoil(*args: Any, **options: Any) -> dict[str, Tensor]:
        tensors = cast_tensors(*args, **options)
        return tensors | {"norm.weight": tensors["norm.weight"] * 1.01}

    monkeypatch.setattr(CAST, spoil)

    code = export(checkpoints, "--output-dir", tmp_path / "served")

    assert code == 4
    assert "`norm.weight` is not the checkpoint's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(
    served: Path, tmp_path: Path, capsys: Capture
) -> None:
    content, tensors = read_folder(served)
    tensors["fc.weight"][2, 3] = torch.nan
    write_folder(tmp_path / "broken", content, tensors)

    assert export(tmp_path / "broken", "--output-dir", tmp_path / "out") == 4

    assert "not finite in `fc.weight`" in capsys.readouterr().err


def test_a_value_beyond_float16_is_refused(served: Path, tmp_path: Path, capsys: Capture) -> None:
    content, tensors = read_folder(served)
    tensors["fc.weight"][2, 3] = 1e5
    write_folder(tmp_path / "large", content, tensors)

    assert export(tmp_path / "large", "--output-dir", tmp_path / "o", "--dtype", "float16") == 4

    assert "does not fit float16" in capsys.readouterr().err


def test_gains_that_never_moved_are_warned_of(
    served: Path, tmp_path: Path, capsys: Capture
) -> None:
    content, tensors = read_folder(served)
    assert export(served, "--output-dir", tmp_path / "one") == 0
    assert "exactly 1.0" not in capsys.readouterr().err
    gains = {name: torch.ones_like(x) for name, x in tensors.items() if "norm" in name}
    write_folder(tmp_path / "unmoved", content, tensors | gains)

    assert export(tmp_path / "unmoved", "--output-dir", tmp_path / "two") == 0

    assert len(gains) == 4
    assert "are exactly 1.0" in capsys.readouterr().err


def test_an_earlier_export_goes_only_when_asked(
    checkpoints: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "served"
    export(checkpoints, "--output-dir", out)
    before = (out / "model.safetensors").read_bytes()

    assert export(checkpoints, "--output-dir", out, "--dtype", "float32") == 2

    assert "`--overwrite`" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert export(checkpoints, "--output-dir", out, "--dtype", "float32", "--overwrite") == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_that_no_export_wrote_is_never_replaced(
    checkpoints: Path, tmp_path: Path, capsys: Capture, flags: list[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    assert export(checkpoints, "--output-dir", tmp_path, *flags) == 2

    assert "`thesis.tex`, which no export wrote" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_files_beside_an_export_are_never_replaced(
    served: Path, checkpoints: Path, capsys: Capture
) -> None:
    shutil.copy(served / "model.safetensors", served / "my_adapter.safetensors")

    assert export(checkpoints, "--output-dir", served, "--overwrite") == 2

    assert "holds `my_adapter.safetensors`, which no export wrote" in capsys.readouterr().err
    assert (served / "my_adapter.safetensors").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json"])
def test_what_was_changed_in_an_export_is_not_replaced(
    served: Path, checkpoints: Path, capsys: Capture, name: str
) -> None:
    with (served / name).open("ab") as stream:
        stream.write(b" ")
    before = (served / name).read_bytes()

    assert export(checkpoints, "--output-dir", served, "--overwrite") == 2

    assert f"`{served / name}` was changed since it was exported" in capsys.readouterr().err
    assert (served / name).read_bytes() == before


@pytest.mark.parametrize("has_shards", [False, True])
def test_an_export_of_an_earlier_version_is_replaced_by_the_names_of_its_files(
    checkpoints: Path, tmp_path: Path, capsys: Capture, has_shards: bool
) -> None:
    out = tmp_path / "served"
    size = ("--max-shard-size", "10KB" if has_shards else "5GB")
    assert export(checkpoints, "--output-dir", out, *size) == 0
    provenance = json.loads((out / "provenance.json").read_text())
    assert len(list(out.iterdir())) == 1 + len(provenance.pop("files"))
    (out / "provenance.json").write_text(json.dumps(provenance))
    (out / "mine.safetensors").touch()

    assert export(checkpoints, "--output-dir", out, "--overwrite") == 2

    assert "holds `mine.safetensors`, which no export wrote" in capsys.readouterr().err
    (out / "mine.safetensors").unlink()
    assert export(checkpoints, "--output-dir", out, "--overwrite") == 0


def test_a_provenance_of_another_tool_proves_nothing(
    served: Path, checkpoints: Path, capsys: Capture
) -> None:
    (served / "provenance.json").write_text('{"tool": {"name": "mine"}}')

    assert export(checkpoints, "--output-dir", served, "--overwrite") == 2

    assert "`README.md`, which no export wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is truncated"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "Git LFS"),
        (None, "has no `config.json`"),
    ],
)
def test_a_verifier_whose_config_is_broken_is_not_written_into_an_export(
    checkpoints: Path, tmp_path: Path, capsys: Capture, content: str | None, reason: str
) -> None:
    (tmp_path / "verifier").mkdir()
    if content is not None:
        (tmp_path / "verifier" / "config.json").write_text(content)
    verifier = ("--verifier-name-or-path", tmp_path / "verifier")

    assert export(checkpoints, "--output-dir", tmp_path / "out", *verifier) == 2

    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_torn_checkpoint_is_refused(checkpoints: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", checkpoints / "checkpoint_best", copy], check=True)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)

    assert export(copy, "--output-dir", tmp_path / "out") == 4

    assert "is corrupted (checksum mismatch)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["./nowhere", "--output-dir", "out"], 2, "`CHECKPOINT`: the folder `./nowhere`"),
        (["empty", "--output-dir", "out"], 4, "neither a whole checkpoint nor a config.json"),
        (["verifier", "--output-dir", "out"], 4, "is no draft"),
        (["verifier"], 2, "`--output-dir` is required"),
        (["run/0", "--output-dir", "run/0"], 2, "holds the checkpoint"),
        (["run", "--output-dir", "out", "--dtype", "int8"], 2, "`--dtype`"),
        (["run", "--output-dir", "out", "--target", "onnx"], 2, "`--target`"),
        (["run", "--output-dir", "out", "--max-shard-size", "big"], 2, "`--max-shard-size` must"),
        (["run", "--output-dir", "out", "--target-layer-ids", "3,5"], 2, "is `3,5`, and the "),
        (["run", "--output-dir", "out", "--target-layer-ids", "3,5,70"], 4, "verifier layer 70"),
        (["run", "--output-dir", "out", "--target", "sglang"], 4, "`norm_before_residual` is on"),
        (["run", "--output-dir", "out", "--target", "eagle"], 4, "`norm_before_residual` is on"),
        (["run", "--output-dir", "link"], 2, "is a link"),
    ],
)
def test_bad_input_writes_nothing(
    checkpoints: Path,
    shared_inputs: TinyInputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    Path("verifier").symlink_to(shared_inputs.verifier_dir)
    Path("run").symlink_to(checkpoints)
    capsys.readouterr()

    assert export(*flags) == code

    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not Path("out").exists()


@pytest.mark.parametrize("killed_after", STAGES)
def test_a_killed_export_leaves_no_folder(
    fork_server: ForkServer, checkpoints: Path, tmp_path: Path, killed_after: str
) -> None:
    out = tmp_path / "served"

    done = fork_server.run("tests.cli.killed_export", killed_after, checkpoints, out)

    assert done.returncode == -9
    assert not out.exists()
    assert export(checkpoints, "--output-dir", out) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_two_exports_into_one_folder_do_not_mix(
    checkpoints: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "served"
    command = [sys.executable, "-c", SLOW, str(checkpoints), str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "written\n"

        code = export(checkpoints, "--output-dir", out, "--dtype", "float32", "--overwrite")

        first.communicate("go on\n")
    assert (code, first.returncode) == (2, 0)
    assert f"is being written by process {first.pid} on" in capsys.readouterr().err
    assert find_problems(out, "vllm") == []
    assert read_folder(out)[1]["fc.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


SLOW = """
import sys
from speculators_cli.core.export import export as module
real = module.verify
def waiting(*args, **options):
    print("written", flush=True)
    sys.stdin.readline()
    return real(*args, **options)
module.verify = waiting
from speculators_cli.cli.app import run
sys.exit(run(["export", sys.argv[1], "--output-dir", sys.argv[2], "--quiet"]))
"""


def test_an_export_that_ended_meanwhile_is_not_replaced(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "served"

    def export_another_first(*args: Any, **options: Any) -> dict[str, Tensor]:
        monkeypatch.setattr(CAST, cast_tensors)
        assert export(checkpoints, "--output-dir", out, "--dtype", "float32") == 0
        return cast_tensors(*args, **options)

    monkeypatch.setattr(CAST, export_another_first)

    assert export(checkpoints, "--output-dir", out) == 2

    assert "is not empty" in capsys.readouterr().err
    assert read_folder(out)[1]["fc.weight"].dtype == torch.float32


@pytest.mark.parametrize("target", ["eagle", "sglang"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_formats_hold_the_same_draft(
    trained: Callable[..., Path], tmp_path: Path, capsys: Capture, target: str, dtype: str
) -> None:
    save_path = trained("--no-norm-before-residual")
    out = tmp_path / "plain"
    capsys.readouterr()

    code = export(save_path, "--output-dir", out, "--target", target, "--dtype", dtype, "--json")

    report = json.loads(capsys.readouterr().out)
    content, tensors = read_folder(out)
    _, source = read_folder(Path(report["source"]))
    named = {name.replace("layers.0.", "midlayer."): x for name, x in source.items()}
    assert code == 0
    assert report["is_verified"] is True
    assert content["architectures"] == ["LlamaForCausalLMEagle3"]
    assert content["rope_parameters"]["rope_theta"] == 50000.0
    assert "target_hidden_size" not in content
    nested = content.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    top = content.get("eagle_aux_hidden_state_layer_ids")
    assert (top, nested) == {"eagle": ([3, 5, 7], None), "sglang": (None, [2, 4, 6])}[target]
    assert tensors.keys() == named.keys()
    assert torch.equal(
        tensors["midlayer.mlp.up_proj.weight"],
        named["midlayer.mlp.up_proj.weight"].to(getattr(torch, dtype)),
    )
    assert find_problems(out, target) == []
    tensors.pop("midlayer.hidden_norm.weight")
    write_folder(out, content, tensors)
    assert find_problems(out, target) == ["`layers.0.hidden_norm.weight` is missing"]


@pytest.mark.parametrize("name", ["--fc-norm", "--norm-before-fc", "--norm-output"])
def test_norms_that_an_engine_lacks_are_refused(
    trained: Callable[..., Path], tmp_path: Path, capsys: Capture, name: str
) -> None:
    save_path = trained("--no-norm-before-residual", name)

    assert export(save_path, "--output-dir", tmp_path / "out", "--target", "sglang") == 4

    err = capsys.readouterr().err
    assert f"its `{name[2:].replace('-', '_')}` is on" in err
    assert "norm_before_residual" not in err


def test_an_upload_that_fails_keeps_the_folder(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from huggingface_hub import HfApi

    def refuse(*_: Any, **__: Any) -> None:
        assert (tmp_path / "served/README.md").exists()
        raise OSError("no route to the hub")

    monkeypatch.setattr(HfApi, "create_repo", refuse)

    code = export(checkpoints, "--output-dir", tmp_path / "served", "--push-to-hub", "me/draft")

    assert code == 5
    assert "is complete, but could not be uploaded to `me/draft`" in capsys.readouterr().err
    assert find_problems(tmp_path / "served", "vllm") == []


def test_a_finished_folder_is_uploaded(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from huggingface_hub import HfApi

    uploaded: list[tuple[str, list[str]]] = []

    def upload(_: object, *, repo_id: str, folder_path: Path) -> None:
        uploaded.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload)

    code = export(checkpoints, "--output-dir", tmp_path / "served", "--push-to-hub", "me/draft")

    files = ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert code == 0
    assert uploaded == [("me/draft", files)]
    assert "Uploaded to `me/draft`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 38, "of vocabulary 37, `"),
        ("hidden_size", 48, "of hidden size 24, `"),
        ("num_hidden_layers", 6, "reads verifier layer 7, `"),
    ],
)
def test_another_verifier_is_refused(
    checkpoints: Path, tmp_path: Path, capsys: Capture, key: str, value: int, message: str
) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "vocab_size": 37,
        "num_hidden_layers": 9,
        key: value,
    }
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    verifier = ("--verifier-name-or-path", tmp_path / "other")

    assert export(checkpoints, "--output-dir", tmp_path / "out", *verifier) == 4

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_verifier_out_of_reach_is_told_of(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verifier = ("--verifier-name-or-path", "example/verifier")

    assert export(checkpoints, "--output-dir", tmp_path / "out", *verifier, "--json") == 0

    out, err = capsys.readouterr()
    assert json.loads(out)["is_verifier_checked"] is False
    assert "warning: Verifier `example/verifier` could not be read" in err

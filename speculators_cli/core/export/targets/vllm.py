"""vLLM, and the speculators format."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.export_format import Rule, equals, is_name, is_size
from speculators_cli.core.export import markdown
from speculators_cli.core.export.engine_rope import EngineRope
from speculators_cli.core.export.targets.target import EngineAdvice, Target

# The oldest and newest tested release whose counts equal those of this package, default draft.
OLDEST_TRIED, NEWEST_TRIED = "0.22.0", "0.32.0"


class Vllm(Target):
    """Serves drafts in the speculators format."""

    name = "vllm"
    engine = "vLLM"

    def rules(self, algorithm: Algorithm[Any, Any]) -> tuple[Rule, ...]:
        """The keys of the speculators format, then those of the algorithm."""
        return (*_speculators_rules(algorithm.name), *super().rules(algorithm))

    def applied_rope(self, layers: Mapping[str, Any]) -> EngineRope:
        """The RoPE that the engine applies."""
        return vllm_rope(layers)

    def serve_command(self, config: DraftConfig, draft_dir: Path) -> str | None:
        """The command that serves the verifier with a draft; one on the hub is found by vLLM."""
        verifier = config.verifier_name_or_path
        if Path(verifier).exists():
            return self.explicit_command(verifier, str(draft_dir), config)
        return f"vllm serve {shlex.quote(str(draft_dir))}{_length_option(config)}"

    def card_text(self, config: DraftConfig, draft_dir: Path) -> str:
        """The command; folders of this machine are replaced."""
        command = self.serve_command(config, draft_dir)
        if command is None or Path(config.verifier_name_or_path).exists():
            command = self.explicit_command("VERIFIER", "THIS_FOLDER", config)
        risk = self.find_serving_risk(config)
        block = markdown.block(command)
        return block if risk is None else f"{block}\n\n{risk}"

    def explicit_command(self, verifier: str, draft: str, config: DraftConfig) -> str:
        """The command that serves a verifier with a draft, wherever the two are."""
        form = self.format_of(config)
        options = {
            "method": form.method,
            "model": draft,
            "num_speculative_tokens": config.num_draft_tokens,
            **form.serve_options,
        }
        line = shlex.quote(json.dumps(options))
        command = f"vllm serve {shlex.quote(verifier)} --speculative-config {line}"
        return command + _length_option(config)

    def advise(self, config: DraftConfig) -> EngineAdvice | None:
        """The oldest tested release that reads all of a draft."""
        needs = [need for need in self.format_of(config).needs if need.has_it(config)]
        if not needs:
            return EngineAdvice(OLDEST_TRIED, f"Tested with vLLM {OLDEST_TRIED} to {NEWEST_TRIED}.")
        oldest = max((need.since for need in needs), key=_numbers)
        reasons = "; they ".join(need.before for need in needs)
        return EngineAdvice(oldest, f"Needs vLLM {oldest} or newer: older ones {reasons}.")

    def find_serving_risk(self, config: DraftConfig) -> str | None:
        """LongRoPE, whose long factors the engine applies only at some lengths."""
        length = longrope_length(config)
        if length is None:
            return None
        return (
            f"Its RoPE is LongRoPE with the long factors. vLLM applies them only with "
            f"`--max-model-len` above {length:,}: with less, which can be its default, it applies "
            "the short factors, and accepts fewer tokens silently."
        )


def longrope_length(config: DraftConfig) -> int | None:
    """The `--max-model-len` above which vLLM applies the long factors of LongRoPE.

    Returns:
        None if it always applies the RoPE of the training.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    length = int(rope["original_max_position_embeddings"])
    return length if config.max_position_embeddings > length else None


def _length_option(config: DraftConfig) -> str:
    """The end of a command that serves a draft with LongRoPE."""
    length = longrope_length(config)
    if length is None:
        return ""
    return f" --max-model-len {min(2 * length, config.max_position_embeddings)}"


def _speculators_rules(algorithm: str) -> tuple[Rule, ...]:
    proposal = "speculators_config.proposal_methods.0"
    verifier = "speculators_config.verifier"
    return (
        Rule("model_type", "`speculators`", equals("speculators")),
        Rule("speculators_model_type", f"`{algorithm}`", equals(algorithm)),
        Rule("speculators_config.algorithm", f"`{algorithm}`", equals(algorithm)),
        Rule("speculators_config.default_proposal_method", "`greedy`", equals("greedy")),
        Rule(f"{proposal}.proposal_type", "`greedy`", equals("greedy")),
        Rule(f"{proposal}.speculative_tokens", "a whole number", is_size),
        Rule(f"{verifier}.name_or_path", "a name", is_name),
        Rule(f"{verifier}.architectures", "a list", lambda value: isinstance(value, list)),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def vllm_rope(layers: Mapping[str, Any]) -> EngineRope:
    """The RoPE that vLLM applies, with `--max-model-len` above LongRoPE's original length.

    Args:
        layers: The values of decoder layers in config.json.

    Raises:
        ValueError: vLLM would refuse the RoPE.
    """
    rope, length = layers["rope_parameters"], layers["max_position_embeddings"]
    sections = [key for key in ("mrope_section", "use_fope") if rope.get(key)]
    if sections:
        raise ValueError(f"`{sections[0]}` depends on more than the position")
    size = int(layers["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    base, kind = rope.get("rope_theta", 10000), rope.get("rope_type", "default")
    plain = [base ** -(i / size) for i in range(0, size, 2)]
    if kind == "default":
        return EngineRope(tuple(plain), 1.0)
    if kind == "longrope":
        return _longrope(plain, rope, length)
    if kind == "yarn":
        return EngineRope(_yarn(plain, rope, base, size), _yarn_scale(rope))
    stretched = {"linear": _linear, "llama3": _llama3}
    if kind == "dynamic":
        return EngineRope(_dynamic(rope, base, size, length), 1.0)
    if kind not in stretched:
        raise ValueError(f"the engine has no RoPE of type `{kind}`")
    return EngineRope(tuple(stretched[kind](x, rope) for x in plain), 1.0)


def _dynamic(rope: Mapping[str, Any], base: float, size: int, length: int) -> tuple[float, ...]:
    power = size / (size - 2)
    if "alpha" in rope:
        base *= rope["alpha"] ** power
    else:
        factor = rope["factor"]
        stretch = factor * length / rope.get("max_trained_positions", length) - (factor - 1)
        base *= stretch**power
    return tuple(base ** -(i / size) for i in range(0, size, 2))


def _linear(frequency: float, rope: Mapping[str, Any]) -> float:
    if not isinstance(rope["factor"], float):
        raise ValueError("`factor` is not written as a decimal number")
    return float(frequency / rope["factor"])


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return float(frequency * (kept + (1 - kept) / rope["factor"]))


def _yarn(plain: list[float], rope: Mapping[str, Any], base: float, size: int) -> tuple[float, ...]:
    def pair_of(turns: float) -> float:
        length = rope["original_max_position_embeddings"]
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(rope.get("beta_fast", 32)), pair_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    found = []
    for i, frequency in enumerate(plain):
        scaled = min(max((i - low) / width, 0.0), 1.0)
        found.append(frequency * (1 - scaled + scaled / rope["factor"]))
    return tuple(found)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    def scale_of(weight: float) -> float:
        factor = rope["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale_of(rope["mscale"]) / scale_of(rope["mscale_all_dim"])
    return scale_of(1.0)


def _longrope(plain: list[float], rope: Mapping[str, Any], length: int) -> EngineRope:
    original = rope["original_max_position_embeddings"]
    chosen = "long" if length > original else "short"
    ratio = length / original
    scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    factors = rope[f"{chosen}_factor"]
    if len(factors) != len(plain):
        raise ValueError(f"`{chosen}_factor` has {len(factors)} values for {len(plain)} pairs")
    frequencies = tuple(x / factor for x, factor in zip(plain, factors, strict=True))
    return EngineRope(frequencies, rope.get(f"{chosen}_mscale", scale))

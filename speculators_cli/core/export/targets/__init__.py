"""The targets: one line each."""

from speculators_cli.core.export.targets.eagle import Eagle
from speculators_cli.core.export.targets.sglang import Sglang
from speculators_cli.core.export.targets.target import Target
from speculators_cli.core.export.targets.vllm import Vllm

TARGETS: dict[str, Target] = {target.name: target for target in (Vllm(), Sglang(), Eagle())}

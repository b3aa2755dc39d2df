"""Shapes of verifiers, from their config.json."""

from speculators_cli.core.models.verifier import VerifierConfig, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.settings.bench import BenchShapeSettings


def _shape(
    name: str,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    theta: float,
) -> VerifierConfig:
    return VerifierConfig(
        name_or_path=name,
        architectures=(),
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=131072,
        norm_offset=0.0,
        is_tied=False,
        logit_softcap=None,
        logit_scale=1.0,
    )


SHAPES: dict[str, tuple[VerifierConfig, int]] = {  # with the number of embedding rows
    "smollm2-135m": (
        _shape(
            "smollm2-135m", hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
            eps=1e-5, theta=100000.0,
        ),
        49152,
    ),
    "llama-3.1-8b": (
        _shape(
            "llama-3.1-8b", hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
            eps=1e-5, theta=500000.0,
        ),
        128256,
    ),
    "llama-3.3-70b": (
        _shape(
            "llama-3.3-70b", hidden=8192, inner=28672, layers=80, heads=64, kv_heads=8,
            head_dim=128, eps=1e-5, theta=500000.0,
        ),
        128256,
    ),
    "qwen3-8b": (
        _shape(
            "qwen3-8b", hidden=4096, inner=12288, layers=36, heads=32, kv_heads=8, head_dim=128,
            eps=1e-6, theta=1000000.0,
        ),
        151936,
    ),
    "qwen3-32b": (
        _shape(
            "qwen3-32b", hidden=5120, inner=25600, layers=64, heads=64, kv_heads=8, head_dim=128,
            eps=1e-6, theta=1000000.0,
        ),
        151936,
    ),
}  # fmt: skip


def find_shape(settings: BenchShapeSettings) -> tuple[VerifierConfig, int]:
    """The verifier's config and its number of embedding rows; only these are read.

    Raises:
        SettingsError: The verifier cannot be used.
        MachineError: The hub cannot be reached.
    """
    if settings.verifier_name_or_path is None:
        return SHAPES[settings.shape]
    files = VerifierFiles(settings.verifier_name_or_path)
    config = read_verifier_config(files, trust_remote_code=settings.trust_remote_code)
    return config, files.read_vocab_size(config.modules)

"""Engines: the verifier that answers and the one that captures, loaded when first used."""

from contextlib import suppress
from functools import cached_property

from speculators_cli.core.capture.job import Job
from speculators_cli.core.engines.engine import Answerer, Capturer
from speculators_cli.core.engines.transformers_engine import TransformersEngine, load_model

# A server is busy to the end of a batch only if many prompts are answered together.
SERVER_SHARDS = 8


class Engines:
    """The engines of a job.

    Args:
        job: Says which ones.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def num_shards_at_once(self) -> int:
        """Shards whose prompts are answered together."""
        given = self._job.settings
        is_server = given.engine.engine == "vllm" or given.engine.endpoint is not None
        return SERVER_SHARDS if given.tokens.regenerate and is_server else 1

    @property
    def answerer(self) -> Answerer:
        """What answers prompts."""
        return self.transformers

    @property
    def capturer(self) -> Capturer:
        """What computes hidden states."""
        return self.transformers

    @cached_property
    def transformers(self) -> TransformersEngine:
        """The verifier in this process."""
        job = self._job
        model = load_model(
            job.files.name_or_path,
            dtype=job.dtype,
            device=job.device,
            device_map=job.settings.engine.device_map,
            trust_remote_code=job.trusts_remote_code,
        )
        return TransformersEngine(
            model, job.layer_ids, end_ids=job.end_ids, name=job.files.name_or_path
        )

    def close(self) -> None:
        """Release what was loaded."""
        for name in ("transformers",):
            with suppress(KeyError):
                vars(self).pop(name).close()

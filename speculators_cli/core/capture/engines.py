"""Engines: the verifier that answers and the one that captures, loaded when first used."""

import os
from functools import cached_property

from speculators_cli.core.capture.job import Job
from speculators_cli.core.engines.endpoint import EndpointAnswerer
from speculators_cli.core.engines.engine import Answerer, Capturer
from speculators_cli.core.engines.transformers_engine import TransformersEngine, load_model
from speculators_cli.core.engines.vllm_args import parse_vllm_args
from speculators_cli.core.engines.vllm_engine import VLLMEngine
from speculators_cli.core.engines.vllm_setup import VLLMSetup

# A server is busy to the end of a batch only if many prompts are answered together.
SERVER_SHARDS = 8


class Engines:
    """The engines of a job.

    Args:
        job: Says which ones.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._opened: list[Answerer | Capturer] = []

    @property
    def num_shards_at_once(self) -> int:
        """Shards whose prompts are answered together."""
        given = self._job.settings
        is_server = given.engine.engine == "vllm" or given.engine.endpoint is not None
        return SERVER_SHARDS if given.tokens.regenerate and is_server else 1

    @property
    def answerer(self) -> Answerer:
        """What answers prompts."""
        return self._verifier if self._job.settings.engine.endpoint is None else self._endpoint

    @property
    def capturer(self) -> Capturer:
        """What computes hidden states."""
        return self._verifier

    def close(self) -> None:
        """Release what was loaded."""
        while self._opened:
            self._opened.pop().close()

    @cached_property
    def _endpoint(self) -> EndpointAnswerer:
        engine = self._job.settings.engine
        assert engine.endpoint is not None, "the caller has checked"
        endpoint = EndpointAnswerer(
            engine.endpoint,
            self._job.files.name_or_path,
            engine.concurrency,
            api_key=os.environ.get("OPENAI_API_KEY"),
        )
        self._opened.append(endpoint)
        return endpoint

    @cached_property
    def _verifier(self) -> TransformersEngine | VLLMEngine:
        """The verifier, in this process or in a child."""
        is_vllm = self._job.settings.engine.engine == "vllm"
        engine = self._start_vllm() if is_vllm else self._load()
        self._opened.append(engine)
        return engine

    def _load(self) -> TransformersEngine:
        job = self._job
        name = job.files.name_or_path
        model = load_model(
            name,
            dtype=job.dtype,
            device=job.device,
            device_map=job.settings.engine.device_map,
            trust_remote_code=job.trusts_remote_code,
        )
        return TransformersEngine(
            model,
            job.layer_ids,
            end_ids=job.end_ids,
            name=name,
            is_float8=job.settings.engine.in_float8,
        )

    def _start_vllm(self) -> VLLMEngine:
        job, engine = self._job, self._job.settings.engine
        setup = VLLMSetup(
            job.files.name_or_path,
            str(job.dtype).removeprefix("torch."),
            python=engine.vllm_python,
            tensor_parallel_size=engine.tensor_parallel_size,
            args=parse_vllm_args(engine.vllm_args),
            trust_remote_code=job.trusts_remote_code,
        )
        return VLLMEngine(setup, layer_ids=job.layer_ids, num_layers=job.config.num_layers)

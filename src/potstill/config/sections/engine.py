"""The fields of an engine beside potstill: how it is started or found, and how far it may be
off."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from potstill.config.roles import Role
from potstill.config.section import Section
from potstill.config.values import Url

# Arguments of vLLM's server that potstill gives, as other values would be another distribution, or
# none at all.
GIVEN_ARGUMENTS = ("--model", "--host", "--port", "--served-model-name", "--load-format")
GIVEN_ARGUMENTS += ("--logprobs-mode", "--generation-config", "--skip-tokenizer-init")
GIVEN_ARGUMENTS += ("--worker-extension-cls", "--logits-processors", "--runner")
GIVEN_ARGUMENTS += ("--enable-sleep-mode",)


class EngineSpec(Section, role=Role.SPEED):
    """A vLLM server in an environment of its own, where `rollouts.engine = "vllm"`
    (docs/engines.md)."""

    python: str = ".venv-vllm/bin/python"
    """Interpreter of the environment that has vLLM; potstill starts its server and ends it."""
    args: Annotated[tuple[str, ...], Role.BACKEND] = ()
    """More arguments of vLLM's server, such as "--gpu-memory-utilization", "0.45"."""
    url: Url | None = None
    """A server of this machine that runs already, which then is not started; only the student
    writes there."""
    sleep: bool = False
    """On a GPU: a server that is started gives its memory back while the student learns, and takes
    the weights anew before the next completion (vLLM's sleep mode). No GPU has run it yet."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that the server has to start, and to answer one request."""
    warn_above: float | None = Field(default=None, gt=0)
    """Mean difference of the engine's and the trainer's log-probabilities (nats a token, without
    sign) that is warned of; by default 0.001 where both are float32, else 0.1."""
    stop_above: float = Field(default=0.5, gt=0)
    """The same that ends the run before the update."""
    importance_cap: Annotated[float | None, Role.OBJECTIVE] = Field(default=None, gt=0)
    """Where drawn tokens are rewarded or a KL is estimated from them: weigh each with the ratio of
    the trainer's probability to the engine's, or to that of the student that wrote a cache, at most
    this (truncated importance sampling)."""

    @field_validator("args")
    @classmethod
    def _leave_ours_alone(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for each in args:
            if each.partition("=")[0].replace("_", "-") in GIVEN_ARGUMENTS:
                raise ValueError(f"{each!r} is what potstill itself says; leave it out")
        return args

    @model_validator(mode="after")
    def _warns_first(self):
        if self.warn_above is not None and self.warn_above >= self.stop_above:
            raise ValueError(
                f"engine.warn_above is {self.warn_above:g} and engine.stop_above "
                f"{self.stop_above:g}, which ends the run before any warning; lower the first"
            )
        return self

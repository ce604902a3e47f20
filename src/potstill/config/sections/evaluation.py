"""The fields of an evaluation: which problems, how many responses, how drawn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.config.roles import Place, Role
from potstill.config.section import Section
from potstill.config.values import MANY_AT_ONCE, Arguments, Seed, Temperature


class Evaluation(Section, role=Role.EVALUATION):
    source: Annotated[str | None, Place.FIRST] = None
    """Task that the problems come from: as in data.source, or a benchmark (gsm8k, math500, amc23,
    aime24) of the hub or of a local file (gsm8k:FILE). Without one nothing is evaluated."""
    split: str = "test"
    """Split of a task or hub data set."""
    template: Literal["chat", "raw"] | None = None
    """As in data.template; template_arguments.NAME tells the template more."""
    system: str | None = None
    """As in data.system; when a run is trained and template is "chat", that one by default. An
    empty text is none."""
    template_arguments: Arguments = Field(default_factory=dict)
    """As in data.template_arguments; when a run is trained, those by default."""
    num_problems: int = Field(default=60, ge=1, le=MANY_AT_ONCE)
    """Problems, held out from training."""
    num_responses: int = Field(default=16, ge=1, le=MANY_AT_ONCE)
    """Responses per problem; Pass@k is reported for every k up to it, at powers of two."""
    temperatures: tuple[Temperature, ...] = Field(default=(1.0, 0.6), min_length=1)
    """Sampling temperatures, all different, each evaluated on its own."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """As in sampling.top_p."""
    top_k: int = Field(default=0, ge=0)
    """As in sampling.top_k."""
    max_tokens: int = Field(default=128, ge=1)
    """Completion length cap in evaluation."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end a response, as the tokenizer names them; by default those stored with the
    model, or after training those of rollouts.end_set."""
    batch_size: int = Field(default=256, ge=1)
    """Rows decoded together."""
    seed: Seed = 0
    """Seed of the problems and of sampling."""

    @model_validator(mode="after")
    def _is_of_a_size(self):
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(
                f"evaluation.temperatures is {list(self.temperatures)}; give each temperature once"
            )
        if (num := self.num_problems * self.num_responses) > 10 * MANY_AT_ONCE:
            raise ValueError(
                f"evaluation.num_problems times evaluation.num_responses is {num}, and "
                f"{10 * MANY_AT_ONCE} responses are the most; lower one of them"
            )
        return self

"""The four methods: corners of the grid of who writes the tokens and which way the KL goes."""

from typing import Literal, NamedTuple


class Method(NamedTuple):
    prefix: Literal["teacher", "student"]
    kl: Literal["forward", "reverse"]
    name: str
    advice: str
    trl: str


# The four corners of the grid, by the name that `--method` takes.
METHODS: dict[str, Method] = {
    "sft": Method(
        "teacher",
        "forward",
        "SFT",
        "soft targets: the cheapest and safest start; keeps the teacher's variety",
        "GKDConfig(lmbda=0, seq_kd=True, beta=0)",
    ),
    "dagger": Method(
        "student",
        "forward",
        "DAgger",
        "repairs the student's own mistakes; keeps entropy for RL",
        "DistillationConfig(beta=0)",
    ),
    "offline-rl": Method(
        "teacher",
        "reverse",
        "Offline RL",
        "sharpens on the teacher's text; the gradient of no sequence KL",
        "GKDConfig(lmbda=0, seq_kd=True, beta=1)",
    ),
    "opd": Method(
        "student",
        "reverse",
        "OPD",
        "best Avg@k a step in the paper; watch entropy and length",
        "DistillationConfig(beta=1)",
    ),
}

"""The role of a field: what it does to a run, and so whether runs that differ in it can be
compared. Also its place."""

from enum import Enum


class Role(Enum):
    """Each field has exactly one: its own, or else that of its section."""

    MODEL = "the models, and how they are loaded and asked"
    DATA = "the prompts"
    PREFIX = "who writes the tokens; a method's name says it"
    DIVERGENCE = "which divergence; a method's name says it"
    WEIGHT_SCHEDULE = "how the forward weight moves"
    TOKEN_WEIGHT = "what each token counts for; a method's name says it"
    REWARD = "how much the scores of responses count; a method's name says it"
    OBJECTIVE = "whatever else makes the expected gradient, the way completions are drawn included"
    WINDOW = "the length of completions in training"
    UPDATE = "what one update takes and does: prompts, optimiser, precision"
    LENGTH = "how many steps a run has, which an extension adds to"
    WARM_UP = "how a run begins; it follows the number of steps by default"
    BUDGET = "the operations that a run may take"
    TUNED = "what is chosen for each method by itself, so that each is at its best"
    SEED = "what tells repetitions of one run apart"
    CACHE = "a store of what the teacher would say"
    BACKEND = (
        "the code that computes the loss, and that draws; results differ by rounding or by random "
        "numbers, and it is part of what a run is"
    )
    ROUNDING = "how work is sliced; results differ by rounding"
    SPEED = "memory for time; no number depends on it"
    OUTPUT = "what is written, where and when; no number depends on it"
    VALIDATION = (
        "how the student is measured between steps; no step depends on it, but for the "
        "prompts held out"
    )
    EVALUATION = "how the finished student is evaluated; no step depends on it"


class Place(Enum):
    """Where help and documentation show a field; without one, it is with its section."""

    FIRST = "among the few that everyone sets"


# Roles of fields and names of fields or sections, as a comparison leaves them out of account.
Selection = tuple[Role | str, ...]

# No step depends on these: a run may be resumed with whatever they were ...
CHANGE_NOTHING = (Role.OUTPUT, Role.EVALUATION, Role.SPEED)
# ... and with these by rounding alone, which is said then. Every other field is what makes it this
# run.
CHANGE_ROUNDING = (Role.ROUNDING,)
# Runs that differ in these alone have one objective: a comparison may take them for alike.
ALIKE = (
    Role.TUNED,
    Role.CACHE,
    Role.BACKEND,
    Role.ROUNDING,
    Role.SPEED,
    Role.OUTPUT,
    Role.VALIDATION,
)
# A method's name says what these fields are.
NAMED = (Role.PREFIX, Role.DIVERGENCE, Role.TOKEN_WEIGHT, Role.REWARD)

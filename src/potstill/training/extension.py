"""Going on past the end of a run: what `--extend-to N` means.

The run has N steps from here on. The steps that are done keep what they were; what follows a
schedule over all steps (a cosine learning rate, a linear forward weight or window) goes on as in a
run of N steps, so that a rate which decayed rises again. `train.extended` records it in the run's
recipe, which by itself gives the same weights from the start.
"""

from potstill.config import Recipe, load_recipe, make_recipe, with_fields
from potstill.runs.run_folder import RunError
from potstill.training import checkpoint


def extended(recipe: Recipe, num_steps: int) -> Recipe:
    """The recipe with its run's steps and extensions, and `num_steps` from the last checkpoint on.

    Raises RunError where there is no run to extend, or nothing to add. Reads the run folder and
    writes nothing.
    """
    file = recipe.out / "recipe.toml"
    if not file.exists():
        raise RunError(
            f"--extend-to: there is no run in {str(recipe.out)!r} yet; train it with "
            f"--train.steps {num_steps} instead"
        )
    there = load_recipe(file)
    if there.train.flops is not None:
        raise RunError(
            f"--extend-to: the run in {str(recipe.out)!r} ends by train.flops, and only steps are "
            "added"
        )
    if num_steps < there.train.steps:
        raise RunError(
            f"--extend-to is {num_steps} and the run in {str(recipe.out)!r} goes to step "
            f"{there.train.steps}; give more"
        )
    pairs = list(there.train.extended)
    last = checkpoint.latest(recipe.out)
    if last is None and (recipe.out / "DONE").exists():
        raise RunError(
            f"--extend-to: the run in {str(recipe.out)!r} has no checkpoint to go on from; it "
            "was removed"
        )
    num_done = checkpoint.step_of(last) if last is not None else 0
    if num_steps > there.train.steps and num_done > max([0, *(until for until, _ in pairs)]):
        pairs.append((num_done, there.train.steps))
    # Both have Role.LENGTH, which alone an extension may change.
    fields = {"train.steps": num_steps, "train.extended": pairs}
    return make_recipe(with_fields(recipe.resolved(), fields), "--extend-to")

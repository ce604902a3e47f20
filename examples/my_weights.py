"""A weighting of your own: how much each token counts, and in which divergence. A recipe names it:

    [objective]
    prefix = "student"
    kl = "reverse"
    weights = "examples/my_weights.py:weights"
    weights_arguments = { above = 0.5 }

It is called once for each batch, between the two passes of the loss, with everything that is known
of the batch's N tokens. What it returns is a constant of the gradient.
"""

import torch

from potstill import LossTerms, Tokens


def weights(tokens: Tokens, above: float, first: int = 8) -> LossTerms:
    """Forward KL where the teacher is unsure (nats), reverse KL elsewhere, and the first tokens
    count twice."""
    # Statistics of both models at each token: entropies, KLs, log-probabilities.
    is_unsure_N = tokens.stats.teacher_entropy_N > above
    # Where a token stands, who wrote it, and the score of its response where something scores.
    weight_N = torch.where(tokens.position_N < first, 2.0, 1.0)
    # One number a token for each term of the loss; a term that is left out has none.
    forward_N = torch.where(is_unsure_N, weight_N, 0.0)
    return LossTerms(forward=forward_N, reverse=weight_N - forward_N)

"""Token classification: cross-entropy of each word's tag, at the sub-words that the data gave a weight."""

from jaxtune.objectives.ops import CLASSING, TOKEN_FIELDS, Objective, token_loss

OBJECTIVE = Objective(fields=TOKEN_FIELDS, loss=token_loss, options=CLASSING)

"""Supervised fine-tuning: cross-entropy of the next token, on the tokens whose loss weight is not zero."""

from jaxtune.objectives.ops import SHAPING, TOKEN_FIELDS, Objective, token_loss

OBJECTIVE = Objective(fields=TOKEN_FIELDS, loss=token_loss, options=SHAPING)

"""Masked-language modelling (arXiv:1810.04805, section 3.1): cross-entropy of the tokens that were masked, seen from both sides.

`data/masking.py` masks them and gives them, and nothing else, a weight: only they pay for the vocabulary projection.
"""

from jaxtune.objectives.ops import SHAPING, TOKEN_FIELDS, Objective, token_loss

OBJECTIVE = Objective(fields=TOKEN_FIELDS, loss=token_loss, options=SHAPING)

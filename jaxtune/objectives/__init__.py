"""Objectives: name -> the module that holds `OBJECTIVE`."""

OBJECTIVES: dict[str, str] = {
    "classify": "jaxtune.objectives.classify",
    "contrastive": "jaxtune.objectives.contrastive",
    "mlm": "jaxtune.objectives.mlm",
    "sft": "jaxtune.objectives.sft",
    "token_classify": "jaxtune.objectives.token_classify",
}

"""Objectives: name -> the module that holds `OBJECTIVE`."""

OBJECTIVES: dict[str, str] = {
    "classify": "jaxtune.objectives.classify",
    "contrastive": "jaxtune.objectives.contrastive",
    "sft": "jaxtune.objectives.sft",
}

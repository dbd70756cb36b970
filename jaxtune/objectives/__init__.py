"""Objectives: name -> the module that holds `OBJECTIVE`."""

OBJECTIVES: dict[str, str] = {
    "classify": "jaxtune.objectives.classify",
    "sft": "jaxtune.objectives.sft",
}

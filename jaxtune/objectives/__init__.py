"""Objectives: name -> the module that holds `OBJECTIVE`."""

OBJECTIVES: dict[str, str] = {
    "sft": "jaxtune.objectives.sft",
}

"""Objectives: name -> the module that holds `OBJECTIVE`."""

OBJECTIVES: dict[str, str] = {
    "classify": "jaxtune.objectives.classify",
    "contrastive": "jaxtune.objectives.contrastive",
    "cpo": "jaxtune.objectives.cpo",
    "dpo": "jaxtune.objectives.dpo",
    "kto": "jaxtune.objectives.kto",
    "mlm": "jaxtune.objectives.mlm",
    "orpo": "jaxtune.objectives.orpo",
    "reward": "jaxtune.objectives.reward",
    "sft": "jaxtune.objectives.sft",
    "simpo": "jaxtune.objectives.simpo",
    "token_classify": "jaxtune.objectives.token_classify",
}

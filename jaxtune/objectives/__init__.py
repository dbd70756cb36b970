"""Objectives: name -> the module that holds `OBJECTIVE`."""

OBJECTIVES: dict[str, str] = {
    "classify": "jaxtune.objectives.classify",
    "contrastive": "jaxtune.objectives.contrastive",
    "cpo": "jaxtune.objectives.cpo",
    "distill": "jaxtune.objectives.distill",
    "dpo": "jaxtune.objectives.dpo",
    "grpo": "jaxtune.objectives.grpo",
    "kto": "jaxtune.objectives.kto",
    "mlm": "jaxtune.objectives.mlm",
    "orpo": "jaxtune.objectives.orpo",
    "ppo": "jaxtune.objectives.ppo",
    "reinforce_pp": "jaxtune.objectives.reinforce_pp",
    "reward": "jaxtune.objectives.reward",
    "rloo": "jaxtune.objectives.rloo",
    "sft": "jaxtune.objectives.sft",
    "simpo": "jaxtune.objectives.simpo",
    "token_classify": "jaxtune.objectives.token_classify",
}

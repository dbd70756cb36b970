"""Model families: the `model_type` of a Hugging Face config -> the module that implements it."""

FAMILIES: dict[str, str] = {
    "llama": "jaxtune.models.llama",
}

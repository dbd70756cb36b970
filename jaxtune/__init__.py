"""jaxtune: fine-tune language models with JAX, on a laptop, a TPU VM or a pod, from one config file."""

__version__ = "0.1.0"

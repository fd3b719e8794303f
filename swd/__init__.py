"""Scale-wise Distillation: few-step diffusion generators that start at a low resolution and grow it at every step."""

__version__ = "0.1.0"

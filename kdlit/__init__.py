"""PyTorch Lightning modules for knowledge distillation of vision models."""

__version__ = "0.1.0"

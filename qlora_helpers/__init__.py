"""What the notebooks of the QLoRA Cookbook share; no lesson is hidden in here."""

__version__ = "0.1.0"

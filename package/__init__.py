"""shuntyard: Llama 4 checkpoints to engines that people can trust.

The rooms, each importing only what stands before it: ``plugins -> exporter -> engines -> validate -> cli``.
"""

__version__ = "0.1.0"

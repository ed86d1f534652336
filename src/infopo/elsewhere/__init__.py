"""Recipes from the configuration files of other tools: LLaMA-Factory, Axolotl and TRL.

Every setting of the file is accounted for in the recipe that comes of it: converted, named as one that needs no setting
here, or named as one that has no counterpart. Imports no torch.
"""

from infopo.elsewhere.reading import TOOLS, convert, tool_of

__all__ = ["TOOLS", "convert", "tool_of"]

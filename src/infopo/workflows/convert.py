"""`infopo convert-recipe`: another tool's file becomes a recipe, and what is lost is said."""

import sys
from pathlib import Path

from infopo.elsewhere import convert
from infopo.output import say
from infopo.workflows.new_file import write_new


def convert_recipe(path: str | Path, tool: str | None = None, output: str | Path | None = None) -> None:
    """Writes the recipe to a new file, or to standard output, and names on standard error what it does not have.

    Args:
        path: The other tool's file.
        tool: A name of `infopo.elsewhere.TOOLS`, or None to recognise it.
        output: The recipe's file, which must not exist, or None for standard output.

    Raises:
        ConfigError: The file cannot be read or converted, or the output cannot be written.
    """
    conversion, recipe = convert(path, tool)
    if output is None:
        sys.stdout.write(recipe)
        sys.stdout.flush()
    else:
        write_new(Path(output), recipe)
    say(
        f"{path}: {conversion.tool}'s settings: {conversion.written} written, {len(conversion.lost)} without a "
        f"counterpart, {len(conversion.needless)} that need none",
        *(f"  without a counterpart: {each}" for each in conversion.lost),
        *(f"  note: {each}" for each in conversion.differences),
        f"Next: infopo check {output or 'RECIPE.yaml'}",
        file=sys.stderr,
    )

"""The command `fcvit recipes`."""

from collections.abc import Iterator
from typing import Any

from fcvit.errors import UsageError
from fcvit.training.recipe import read_recipe, shipped, shipped_text


class Recipes(dict[str, Any]):
    """Shipped recipes: name -> the text of the file."""

    def tables(self) -> Iterator[Any]:
        """List the recipes; show the file of a single one."""
        from fcvit.report.tables import table

        if len(self) == 1:
            yield from (text.rstrip() for text in self.values())
            return
        listing = table("recipe", "variant", "epochs", "batch", right=("epochs", "batch"))
        for name in self:
            recipe = read_recipe(name, {} if "variant =" in self[name] else {"variant": "fcvit_tiny"})
            variant = recipe.variant if "variant =" in self[name] else "that of the weights"
            listing.add_row(name, variant, str(recipe.total_epochs), str(recipe.batch_size))
        yield listing
        yield "fcvit recipes NAME prints one; fcvit train NAME --data FOLDER trains by it"


def recipes(name: str | None = None, /) -> Recipes:
    """List the recipes that come with the package, or print one.

    Args:
        name: Of the recipe to print (default: list all).

    Raises:
        UsageError: there is no such recipe.
    """
    if name is not None and name not in shipped():
        raise UsageError(f"recipes: {name!r:.60}: expected one of {', '.join(shipped())}")
    return Recipes({one: shipped_text(one) for one in ([name] if name else shipped())})

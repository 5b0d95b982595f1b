"""List and print the included recipes (`fcvit recipes`)."""

from collections.abc import Iterator
from typing import Any

from fcvit.errors import UsageError
from fcvit.training.recipe import read_recipe, shipped, shipped_text


class Recipes(dict[str, Any]):
    """A dictionary from the names of recipes to the text of their files."""

    def tables(self) -> Iterator[Any]:
        """Yield a table of the recipes, or the text of the file if there is only one recipe."""
        from fcvit.report.tables import table

        if len(self) == 1:
            yield from (text.rstrip() for text in self.values())
            return
        listing = table("recipe", "variant", "epochs", "batch size", right=("epochs", "batch size"))
        for name in self:
            recipe = read_recipe(name, {} if "variant =" in self[name] else {"variant": "fcvit_tiny"})
            variant = recipe.variant if "variant =" in self[name] else "variant of the weights"
            listing.add_row(name, variant, str(recipe.total_epochs), str(recipe.batch_size))
        yield listing
        yield "Print a recipe: fcvit recipes NAME. Train with it: fcvit train NAME --data FOLDER."
        yield "fcvit finetune takes the recipe finetune, segmentation or detection, with the variant of the weights."


def recipes(name: str | None = None, /) -> Recipes:
    """List the recipes included in the package, or print one.

    Args:
        name: Name of the recipe to print (default: list all recipes).

    Raises:
        UsageError: The recipe does not exist.
    """
    if name is not None and name not in shipped():
        raise UsageError(f"recipes: unknown recipe {name!r:.60}; expected one of {', '.join(shipped())}")
    return Recipes({one: shipped_text(one) for one in ([name] if name else shipped())})

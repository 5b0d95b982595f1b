"""Write the table of recipe fields to docs/training.md, from the declarations in `fcvit.tasks`."""

from pathlib import Path

from fcvit.training.recipe import fields_of_all_tasks

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
HEADING = "## Fields of a recipe\n"


def page(text: str) -> str:
    """Return the text of the page with an updated table of the recipe fields."""
    rows = ["", "| field | values | default | |", "| --- | --- | --- | --- |"]
    group = ""
    for name, field in fields_of_all_tasks().items():
        if field.group != group:
            group = field.group
            rows.append(f"| **{group}** | | | |")
        default = f"`{field.default_text}`" if field.default_text else ""
        rows.append(f"| `{name}` | {field.expected} | {default} | {field.description} |")
    before, _, rest = text.partition(HEADING)
    _, next_heading, after = rest.partition("\n## ")
    return before + HEADING + "\n".join(rows) + "\n" + next_heading + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")

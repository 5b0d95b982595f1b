"""List the variants (`fcvit models`)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from fcvit.models.spec import ModelSpec, parameter_count
from fcvit.models.variants import VARIANTS, published


class Models(dict[str, Any]):
    """The variants by name, with the published figures."""

    def tables(self) -> Iterator[Any]:
        """Yield a table of the variants, and links to the authors' checkpoints."""
        from fcvit.report.tables import table

        figures = ("parameters", "/ 2^20", "GMAC", "crop", "top-1 (%)")
        result = table("variant", *figures, title="published figures: ImageNet-1K at 224 x 224", right=figures)
        for name, variant in VARIANTS.items():
            row = published(variant)
            count = row.parameters if row else parameter_count(ModelSpec(variant, 10))
            cells = [f"{count:,}", f"{count / 2**20:.1f}M", f"{row.gmac:.3f}" if row else ""]
            cells += [f"{variant.preprocessing.crop_fraction:.2f}"]
            result.add_row(name, *cells, f"{row.top1:.1f}" if row else "this package: 10 classes, 32 x 32")
        yield result
        yield "The authors' checkpoints must be downloaded separately (Apache-2.0, github.com/ma-xu/FCViT):"
        for name, variant in VARIANTS.items():
            if row := published(variant):
                yield f"  {name:<11} {row.url}"


def models() -> Models:
    """List the variants, the published figures, and links to the authors' checkpoints."""
    rows = {}
    for name, variant in VARIANTS.items():
        figures = published(variant)
        rows[name] = dataclasses.asdict(variant) | {"published": figures and dataclasses.asdict(figures)}
    return Models(rows)

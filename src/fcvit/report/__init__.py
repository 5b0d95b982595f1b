"""Progress bars, tables, charts, image grids and HTML report pages."""

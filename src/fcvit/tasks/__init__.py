"""Tasks: what a network learns, measured and shown in its own way, by loops that know no task."""

"""Tasks such as classification: their data, losses, metrics and reports, behind one interface (`tasks.base`)."""

"""The SQL of the cohort builder, one step per file."""

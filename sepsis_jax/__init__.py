"""Is it true, and who can use it? Cohorts, pipelines, reports, the command line."""

"""The report of a run: its figures (tables), their plots (plots) and the page that holds both (html)."""

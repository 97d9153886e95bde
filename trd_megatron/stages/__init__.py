"""The stages of a run: one file each, `run(config, run_dir, folder)` returns the counts for the manifest."""

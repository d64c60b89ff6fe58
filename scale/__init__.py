"""Open checkpoints, files of problems, large models, many processes."""

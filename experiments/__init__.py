"""What was run: `results`, and `benchmarks`. The experiments themselves are `lightning_prune.study`."""

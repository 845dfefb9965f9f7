"""Experiments described by Hydra configs. Imports lightning_prune, never the reverse.

- `run`: the entry, `python -m experiments.run experiment=<name>`
- `data`, `models`, `tasks`: what is trained
- `records`: one line a round; `controls`: the ticket's masks again, on other weights
- `progress`: one bar for the whole experiment
- `report`: a folder of runs -> table, claims, figure
"""

"""Experiments described by Hydra configs. Imports lightning_prune, never the reverse.

- `run`: the entry, `python -m experiments.run experiment=<name>`
- `data`, `models`, `tasks`: what is trained
- `records`: one line a round
- `tickets`: what a finished ticket left; `controls`: its start, one thing of it changed, trained again
- `connectivity`: are two trainings from one state joined by a line of low error?
- `statistics`: spread over seeds, paired differences, overlap of masks; `claims`: published claims, checked
- `progress`: one bar for the whole experiment
- `report`: a folder of runs -> table, claims, figure
"""

"""Experiments described by Hydra configs: `lightning-prune run`, `plan` and `report`.

- `command`: the command line; `run`: one run in its folder; `plan`: what a sweep would do
- `configs`: where configs lie and what two differ in; `locks`: one writer at a time
- `data`, `models`, `tasks`: what is trained; `training`: how, round by round
- `sharding`: FSDP2 in processes that end with a run
- `shared_rounds`: a dense round is trained once; `recording`, `round_masks`: what a run writes as it trains
- `records`: one line a round, read and written; `run_folders`: a folder of runs, read
- `tickets`: what a finished ticket left; `controls`: its start, one thing of it changed, trained again;
  `equal_size`: masks of the ticket's size by another criterion
- `oneshot`, `channel_cuts`, `minilm`, `smollm2`, `connectivity`: what else an experiment may do
- `statistics`: spread over seeds, paired differences, overlap of masks; `claims`: published claims, checked
- `figures`, `costs`, `report`: a folder of runs -> table, claims, page
- `progress`: one bar for the whole experiment; `mask_images`: masks as pictures for loggers
"""
